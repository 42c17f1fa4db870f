"""LlamaGen-L (arXiv 2406.06525) for inference: 256 codes in raster order, and its VQ decoder.

DetailFlow's generator is of LlamaGen's family, so the same network with groups of one token serves;
its positions turn by one axis instead of two, which costs the same. The weights are random.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models import generator, layers, sampler
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import logits as filters

SIDE, CODES, CODE_DIM, GUIDANCE = 16, 16_384, 8, 2.0
DECODER = VAEConfig(latent_channels=256, scale_factor=1.0, decoder_attention=(4,), quant_conv=False)


class Decoder(nn.Module):
    """Codes [B, 256] -> images."""

    dtype: str

    @nn.compact
    def __call__(self, codes):
        table = self.param("codebook", nn.initializers.normal(0.02), (CODES, CODE_DIM))
        wide = nn.Dense(256, dtype=jnp.dtype(self.dtype), name="post_quant")
        grid = wide(table[codes]).reshape(len(codes), SIDE, SIDE, 256)
        return VAE(dataclasses.replace(DECODER, dtype=self.dtype), name="decoder").decode(grid)


def networks(dtype: str) -> Iterator[tuple[str, nn.Module, tuple[Any, ...], str]]:
    """(name, network, arguments of its initialisation, method)."""
    config = generator.GeneratorConfig(
        **generator.SIZES["GPT-L"],
        num_tokens=SIDE * SIDE,
        group_size=1,
        codebook_size=CODES,
        dtype=dtype,
        scan=False,
    )
    codes = jnp.zeros((1, SIDE * SIDE), jnp.int32)
    yield "generator", generator.Generator(config), (codes, codes[:, 0]), "__call__"
    yield "decoder", Decoder(dtype), (codes,), "__call__"


def sample(modules: dict[str, nn.Module], params: dict[str, Any], labels, keys) -> jax.Array:
    """Images float32 [B, 256, 256, 3]."""
    scales = filters.guidance_scales(GUIDANCE, SIDE * SIDE, 1, 1)
    options = sampler.SamplingOptions(SIDE * SIDE)
    codes = sampler.sample(
        modules["generator"], params["generator"], labels, keys, np.asarray(scales), options=options
    )
    return layers.apply(modules["decoder"], params["decoder"], codes)
