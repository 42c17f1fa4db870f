"""TiTok-L-32 (arXiv 2406.07550) for inference: 32 tokens, unmasked in 8 steps, and its decoder.

Written for its speed: sizes, steps and arithmetic are those of the published code, the weights are
random. Shapes: B samples, R = 2B rows (of each sample the conditional, then the null row), N = 32
tokens, W width.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from detailflow_jax.models import layers
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import logits as filters

PIXELS = VAEConfig(latent_channels=256, scale_factor=1.0, quant_conv=False)
"""The decoder of MaskGIT's VQGAN, up to the attention in its middle, which that one lacks."""

STEPS, GUIDANCE, RANDOMNESS = 8, 4.5, 9.5


@dataclasses.dataclass(frozen=True)
class TiTokConfig:
    """TiTok-L-32; `width` and `heads` are those of the generator."""

    num_tokens: int = 32
    codes: int = 4096
    code_dim: int = 12
    num_classes: int = 1000
    depth: int = 24
    width: int = 768
    heads: int = 16
    decoder_depth: int = 24
    decoder_width: int = 1024
    decoder_heads: int = 16
    grid: int = 16
    pixel_codes: int = 1024
    pixel_code_dim: int = 256
    dtype: str = "float32"


class Block(nn.Module):
    """Attention and an MLP, each with a layer norm before it, or after the sum as in BERT."""

    heads: int
    dtype: str
    norm_first: bool

    @nn.compact
    def __call__(self, x, prefix, mask, rope):
        dtype, width = jnp.dtype(self.dtype), x.shape[-1]
        attention = layers.Attention(self.heads, self.heads, True, dtype, name="attention")
        wide = layers.dense(4 * width, ("embed", "mlp"), dtype=dtype, name="mlp_in")
        narrow = layers.dense(width, ("mlp", "embed"), dtype=dtype, name="mlp_out")

        def mlp(y):
            return narrow(nn.gelu(wide(y), approximate=False))

        for norm, part in (("norm1", lambda y: attention(y)[0]), ("norm2", mlp)):
            norm = layers.layer_norm(norm)
            if self.norm_first:
                x = x + part(norm(x).astype(dtype))
            else:
                x = norm(x + part(x)).astype(dtype)
        return x, ()


class Generator(nn.Module):
    """A bidirectional transformer over the class and the tokens, masked ones among them."""

    config: TiTokConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        small = nn.initializers.normal(0.02)
        rows = c.codes + c.num_classes + 2  # codes, classes, no class, mask
        self.table = self.param("table", small, (rows, c.width))
        self.positions = self.param("positions", small, (c.num_tokens + 1, c.width))
        self.norm = layers.layer_norm()
        options = {"heads": c.heads, "dtype": c.dtype, "norm_first": False}
        self.blocks = layers.Stack(Block, options, c.depth, scan=False)
        self.head = layers.dense(c.codes, ("embed", "vocab"), dtype=dtype)

    def logits(self, tokens, classes):
        """Tokens [R, N], rows of classes [R] -> float32 [R, N, V]."""
        x = self.table[jnp.concatenate([classes[:, None], tokens], axis=1)] + self.positions
        x, _ = self.blocks(self.norm(x).astype(self.config.dtype))
        return self.head(x[:, 1:]).astype(jnp.float32)

    def sample(self, labels, keys, guidance):
        """Codes [B, N]: every step draws all masked tokens and masks the least certain again."""
        c = self.config
        mask = c.codes + c.num_classes + 1
        classes = filters.pair(c.codes + labels, jnp.full_like(labels, mask - 1))

        def step(tokens, index):
            ratio = (index + 1.0) / STEPS
            logits = self.logits(filters.pair(tokens, tokens), classes)
            logits = filters.guide(*filters.unpair(logits), 1 + guidance * index / STEPS)
            draw = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            drawn = filters.sample_codes(draw, logits)
            codes = jnp.where(tokens == mask, drawn, tokens)
            chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
            certain = jnp.where(tokens == mask, chosen, jnp.inf)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, (c.num_tokens,)))(draw)
            certain = certain + RANDOMNESS * (1 - ratio) * noise
            # Masked anew, the fewer the later: arccos(r) / (pi / 2) of all.
            count = jnp.floor(jnp.arccos(ratio) / (jnp.pi / 2) * c.num_tokens).astype(jnp.int32)
            rank = jnp.argsort(jnp.argsort(certain, axis=-1), axis=-1)
            return jnp.where(rank < count, mask, codes), None

        start = jnp.full((len(labels), c.num_tokens), mask, jnp.int32)
        return jax.lax.scan(step, start, jnp.arange(STEPS))[0]


class Decoder(nn.Module):
    """Codes [B, N] -> what the pixel decoder reads, [B, 16, 16, 256]."""

    config: TiTokConfig

    @nn.compact
    def __call__(self, codes):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        small, width, side = nn.initializers.normal(0.02), c.decoder_width, c.grid
        codebook = self.param("codebook", small, (c.codes, c.code_dim))
        positions = self.param("positions", small, (side * side + 1 + c.num_tokens, width))
        start, mask = (self.param(name, small, (1, 1, width)) for name in ("start", "mask"))
        tokens = layers.dense(width, ("code", "embed"), dtype=dtype, name="embed")(codebook[codes])
        x = jnp.concatenate([start, jnp.broadcast_to(mask, (1, side * side, width))], axis=1)
        x = jnp.concatenate([jnp.broadcast_to(x, (len(codes), *x.shape[1:])), tokens], axis=1)
        x = layers.layer_norm("norm_in")(x + positions).astype(dtype)
        options = {"heads": c.decoder_heads, "dtype": c.dtype, "norm_first": True}
        x, _ = layers.Stack(Block, options, c.decoder_depth, scan=False, name="blocks")(x)
        x = layers.layer_norm("norm_out")(x[:, 1 : 1 + side * side]).astype(dtype)
        x = nn.tanh(layers.dense(2 * width, ("embed", "mlp"), dtype=dtype, name="wide")(x))
        x = layers.dense(c.pixel_codes, ("mlp", "vocab"), dtype=dtype, name="pixel_codes")(x)
        table = self.param("pixel_codebook", small, (c.pixel_codes, c.pixel_code_dim))
        soft = nn.softmax(x.astype(jnp.float32)).astype(dtype) @ table.astype(dtype)
        return soft.reshape(len(codes), side, side, -1)


def networks(dtype: str) -> Iterator[tuple[str, nn.Module, tuple[Any, ...], str]]:
    """(name, network, arguments of its initialisation, method)."""
    config = TiTokConfig(dtype=dtype)
    tokens = jnp.zeros((1, config.num_tokens), jnp.int32)
    yield "generator", Generator(config), (tokens, tokens[:, 0]), "logits"
    yield "decoder", Decoder(config), (tokens,), "__call__"
    pixels = VAE(dataclasses.replace(PIXELS, dtype=dtype))
    yield "pixels", pixels, (jnp.zeros((1, 16, 16, 256)),), "decode"


def sample(modules: dict[str, nn.Module], params: dict[str, Any], labels, keys) -> jax.Array:
    """Images float32 [B, 256, 256, 3]."""
    codes = layers.apply(
        modules["generator"], params["generator"], labels, keys, GUIDANCE, method="sample"
    )
    grid = layers.apply(modules["decoder"], params["decoder"], codes)
    return layers.apply(modules["pixels"], params["pixels"], grid, method="decode")
