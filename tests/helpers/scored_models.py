"""Small models with random weights, and what they are scored with, for tests of evaluation."""

import jax
import jax.numpy as jnp
import numpy as np

import detailflow_jax as df
from detailflow_jax.evaluate.features import FeatureExtractor, FeatureNetwork
from detailflow_jax.inference import api
from detailflow_jax.models import flowar as flowar_network
from detailflow_jax.models import generator as generator_network
from detailflow_jax.models import siglip
from detailflow_jax.models import tokenizer as tokenizer_network
from detailflow_jax.models import vae as vae_network
from detailflow_jax.runtime import pictures, sharding
from random_weights import TRUNK, random_like

SIZE = 16


def tokenizer():
    vit = siglip.ViTConfig(**(TRUNK | {"depth": 1}))
    config = tokenizer_network.TokenizerConfig(
        image_size=SIZE, num_tokens=8, group_size=2, codebook_size=64, encoder=vit, decoder=vit
    )
    init = tokenizer_network.Tokenizer(config).init
    abstract = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    return df.Tokenizer(config, random_like(abstract)["params"])


def generator():
    config = generator_network.GeneratorConfig(
        width=16,
        depth=1,
        num_heads=2,
        multiple_of=8,
        num_tokens=8,
        group_size=2,
        codebook_size=64,
        num_classes=3,
    )
    init = generator_network.Generator(config).init
    codes, labels = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,), jnp.int32)
    abstract = jax.eval_shape(init, jax.random.key(0), codes, labels)
    return df.Generator(config, random_like(abstract)["params"])


def flowar():
    config = flowar_network.FlowARConfig(
        width=16,
        first_depth=1,
        second_depth=1,
        num_heads=2,
        scales=(1, 4),
        channels=3,
        num_classes=3,
        head_width=16,
        head_depth=1,
        head_dim=8,
    )
    init, arguments = flowar_network.FlowAR(config).init, flowar_network.example(config)
    abstract = jax.eval_shape(init, jax.random.key(0), *arguments)
    return api.FlowAR(config, random_like(abstract)["params"])


def vae():
    config = vae_network.VAEConfig(
        channels=8, multipliers=(1, 1, 1), res_blocks=1, latent_channels=3, norm_groups=4
    )
    init, example = vae_network.VAE(config).init, jnp.zeros((1, SIZE, SIZE, 3))
    return df.VAE(config, random_like(jax.eval_shape(init, jax.random.key(0), example))["params"])


def network():
    """Stands where Inception does: random projections of pixels, rectified."""
    rng = np.random.default_rng(7)
    shapes = {"pool": (SIZE * SIZE * 3, 12), "logits": (12, 5)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def apply(params, images):
        x = images.astype(jnp.float32) / 127.5 - 1
        pool = jax.nn.relu(x.reshape(len(x), -1) @ params["pool"] * 0.1)
        return {"pool": pool, "spatial": x[:, ::4, ::4], "logits": pool @ params["logits"]}

    return FeatureNetwork(apply, params, "random-projection")


def images(count=60, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def mesh_of(count):
    return sharding.make_mesh({"data": -1}, jax.devices()[:count])


def extractor(batch_size=16, devices=1):
    return FeatureExtractor(network(), mesh=mesh_of(devices), batch_size=batch_size)


def save_pictures(folder, arrays, name="{:03d}.png"):
    for i, array in enumerate(arrays):
        file = folder / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_png(file, array)
