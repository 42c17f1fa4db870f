"""Random parameters under which outputs depend on inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

TRUNK = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 8, "table_side": 2}


def random_like(abstract, seed=0):
    """Random parameters under which outputs depend on inputs."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
        name = path[-1].key
        if name in ("bias", "scale"):
            return 0.1 * noise + (name == "scale")
        return noise * (2 * leaf.shape[-2] ** -0.5 if name == "kernel" else 1.0)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract))
