"""A FlowAR of a few hundred parameters, and its samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models import flow_sampler
from detailflow_jax.models.flowar import FlowAR, FlowARConfig, example

TINY = FlowARConfig(
    width=16, first_depth=1, second_depth=1, num_heads=2, scales=(1, 3), channels=3,
    num_classes=4, head_width=16, head_depth=1, head_dim=8, scan=False,
)  # fmt: skip


def random_like(tree, seed=0):
    """Parameters of random bits: those of a new head are zero where it matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), tree)


@functools.cache
def network(config):
    model = FlowAR(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *example(config))["params"]
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    abstract = jax.tree.map(lambda x: x.value if is_box(x) else x, abstract, is_leaf=is_box)
    return model, random_like(abstract)


def sampled(config, params, labels, indices, cfg_scale=3.0, noise=None, **fields):
    steps = fields.pop("num_steps", 4)
    times = flow_sampler.flow_times(len(config.scales), steps, fields.pop("grid", "published"))
    options = flow_sampler.FlowSamplingOptions(times, guided=cfg_scale != 1, **fields)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.asarray(indices))
    factors = flow_sampler.guidance_factors(cfg_scale, len(config.scales))
    return flow_sampler.sample(
        FlowAR(config), params, jnp.asarray(labels), keys, factors, noise, options=options
    )
