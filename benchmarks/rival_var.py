"""VAR (arXiv 2404.02905) for inference: next-scale prediction over a residual pyramid of codes.

Written for its speed: sizes, steps and arithmetic are those of the published code, the weights are
random. Shapes: B samples, R = 2B rows (of each sample the conditional, then the null row), K scales
of sides i, T = 680 positions, W width, C = 32 code channels, S = 16.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models import layers
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import interpolation
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import scales as grids

DECODER = VAEConfig(
    channels=160, latent_channels=32, scale_factor=1.0, decoder_attention=(4,), quant_conv=True
)
"""The convolutional decoder: width 160, attention at its deepest level."""

TOP_K, TOP_P, GUIDANCE = 900, 0.96, 4.0


@dataclasses.dataclass(frozen=True)
class VARConfig:
    """VAR-d16; width and heads follow the depth."""

    depth: int = 16
    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    codes: int = 4096
    code_dim: int = 32
    num_classes: int = 1000
    dtype: str = "float32"

    @property
    def width(self) -> int:
        return 64 * self.depth

    @property
    def num_tokens(self) -> int:
        return grids.offsets(self.sides)[-1]


class Block(nn.Module):
    """Attention with normalised queries and keys, and an MLP, both modulated by the class."""

    config: VARConfig

    @nn.compact
    def __call__(self, x, prefix, mask, rope, condition):
        c, dtype = self.config, jnp.dtype(self.config.dtype)

        def linear(size: int, name: str, bias: bool = True) -> nn.Dense:
            return layers.dense(size, ("embed", "mlp"), dtype=dtype, use_bias=bias, name=name)

        def modulated(x, scale, shift):
            return _norm(x) * (1 + scale) + shift

        vectors = linear(6 * c.width, "modulation")(nn.silu(condition))[:, None]
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(vectors, 6, axis=-1)
        y = modulated(x, scale1, shift1).astype(dtype)
        heads = (*x.shape[:2], c.depth, 64)
        query, key, value = (
            linear(c.width, name, name != "key")(y).reshape(heads)
            for name in ("query", "key", "value")
        )
        sharpness = self.param("sharpness", nn.initializers.constant(np.log(4.0)), (c.depth, 1))
        sharpness = jnp.exp(jnp.minimum(sharpness, np.log(100.0))) * 8  # attend divides by 8
        query, key = _unit(query) * sharpness.astype(dtype), _unit(key)
        y = layers.attend(query, key, value, prefix=prefix, mask=mask)
        x = x + gate1 * linear(c.width, "output")(y.reshape(x.shape))
        y = linear(4 * c.width, "mlp_in")(modulated(x, scale2, shift2).astype(dtype))
        x = x + gate2 * linear(c.width, "mlp_out")(nn.gelu(y, approximate=True))
        return x, (key, value)


def _norm(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-6)


def _unit(x: jax.Array) -> jax.Array:
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-12)).astype(x.dtype)


class VAR(nn.Module):
    """The transformer and the quantizer's parts that sampling needs."""

    config: VARConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        small = nn.initializers.normal(0.02)
        self.classes = self.param("classes", small, (c.num_classes + 1, c.width))
        self.start = self.param("start", small, (1, c.width))
        self.positions = self.param("positions", small, (c.num_tokens, c.width))
        self.levels = self.param("levels", small, (len(c.sides), c.width))
        self.codebook = self.param("codebook", small, (c.codes, c.code_dim))
        self.embed = layers.dense(c.width, ("code", "embed"), dtype=dtype)
        self.blocks = layers.Stack(Block, {"config": c}, c.depth, scan=False)
        self.modulation = layers.dense(2 * c.width, ("embed", "mlp"), dtype=dtype)
        self.head = layers.dense(c.codes, ("embed", "vocab"), dtype=dtype)
        self.smooth = [nn.Conv(c.code_dim, (3, 3), dtype=dtype) for _ in range(4)]

    def run(self, x, condition, scale: int, cache):
        """Logits float32 [R, i^2, V] of one scale from its inputs [R, i^2, W], and the cache."""
        first, last = grids.offsets(self.config.sides)[scale : scale + 2]
        x = x + self.levels[scale] + self.positions[first:last]
        x, own = self.blocks(x, prefix=cache, context=(condition,))
        cache = own if cache is None else jax.tree.map(_append, cache, own)
        shift, factor = jnp.split(self.modulation(nn.silu(condition))[:, None], 2, axis=-1)
        x = (_norm(x) * (1 + factor) + shift).astype(self.config.dtype)
        return self.head(x).astype(jnp.float32), cache

    def residual(self, codes, scale: int):
        """What the codes [B, i^2] of a scale add to the latent [B, S, S, C]."""
        side, whole = self.config.sides[scale], self.config.sides[-1]
        grid = self.codebook[codes].reshape(len(codes), side, side, -1)
        matrix = interpolation.bicubic_matrix(side, whole)
        grid = interpolation.apply_matrices(grid, matrix, matrix)
        smooth = self.smooth[min(scale * 4 // len(self.config.sides), 3)]
        return 0.5 * grid + 0.5 * smooth(grid)

    def next_inputs(self, latent, scale: int):
        """Inputs [B, i^2, W] of a scale from the latent so far."""
        return self.embed(grids.reduce_to(latent, self.config.sides[scale]))

    def parts(self, labels):
        """Every part once: initialisation need not trace all scales."""
        condition = self.classes[labels]
        grid = jnp.zeros((1, 1, 1, self.config.code_dim))
        for smooth in self.smooth:
            grid = smooth(grid)
        return self.embed(grid), self.run(condition[:, None] + self.start, condition, 0, None)[0]

    def sample(self, labels, keys, guidance):
        """Latents [B, S, S, C]: all scales, with a cache; guidance grows with the scale."""
        c, cache = self.config, None
        classes = filters.pair(labels, jnp.full_like(labels, c.num_classes))
        condition = self.classes[classes]
        x = condition[:, None] + self.start
        latent = jnp.zeros((len(labels), c.sides[-1], c.sides[-1], c.code_dim))
        for scale in range(len(c.sides)):
            logits, cache = self.run(x, condition, scale, cache)
            factor = 1 + guidance * scale / (len(c.sides) - 1)
            logits = filters.guide(*filters.unpair(logits), factor)
            logits = filters.top_p_filter(filters.top_k_filter(logits, TOP_K), TOP_P)
            scale_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, scale)
            latent += self.residual(filters.sample_codes(scale_keys, logits), scale)
            if scale + 1 < len(c.sides):
                x = self.next_inputs(latent, scale + 1)
                x = filters.pair(x, x)
        return latent


def _append(cache: jax.Array, own: jax.Array) -> jax.Array:
    return jnp.concatenate([cache, own], axis=1)


def networks(dtype: str) -> Iterator[tuple[str, nn.Module, tuple[Any, ...], str]]:
    """(name, network, arguments of its initialisation, method)."""
    yield "generator", VAR(VARConfig(dtype=dtype)), (jnp.zeros(1, jnp.int32),), "parts"
    decoder = VAE(dataclasses.replace(DECODER, dtype=dtype))
    yield "decoder", decoder, (jnp.zeros((1, 16, 16, 32)),), "decode"


def sample(modules: dict[str, nn.Module], params: dict[str, Any], labels, keys) -> jax.Array:
    """Images float32 [B, 256, 256, 3]."""
    latent = layers.apply(
        modules["generator"], params["generator"], labels, keys, GUIDANCE, method="sample"
    )
    return layers.apply(modules["decoder"], params["decoder"], latent, method="decode")
