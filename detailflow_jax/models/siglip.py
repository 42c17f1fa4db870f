"""The SigLIP2-NaFlex vision transformer: trunk of the encoder, of the decoder, and the teacher.

Shapes: B batch, H x W pixels, P = height * width patches, T tokens, D width, L layers.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.models import layers
from detailflow_jax.models.layers import LayerCache, Mask, Prefix, Rope, Tokens
from detailflow_jax.ops import Array, interpolation, padded, patches

Images = Float[Array, "B H W 3"]
Patches = Float[Array, "B P D"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer; the defaults are SigLIP2-so400m."""

    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_dim: int = 4304
    patch_size: int = 16
    table_side: int = 16  # the learned position table covers table_side x table_side patches

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is no multiple of num_heads={self.num_heads}")


class Block(nn.Module):
    """Pre-norm attention and tanh-GELU MLP, LayerNorm eps 1e-6, biases everywhere."""

    num_heads: int
    mlp_dim: int
    dtype: Any
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: Any, prefix: Prefix | None, mask: Mask | None, rope: Rope | None
    ) -> tuple[Any, Any]:
        """Tokens [B, T, D] after the block, and their own keys and values."""
        attention = layers.Attention(
            self.num_heads,
            self.num_heads,
            use_bias=True,
            dtype=self.dtype,
            implementation=self.implementation,
            name="attention",
        )
        y, keys_values = attention(
            layers.layer_norm("norm1")(x).astype(self.dtype), prefix=prefix, mask=mask, rope=rope
        )
        x = x + y
        y = layers.layer_norm("norm2")(x).astype(self.dtype)
        y = layers.dense(self.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name="fc1")(y)
        y = nn.gelu(nn.with_logical_constraint(y, ("batch", "length", "mlp")), approximate=True)
        y = layers.dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="fc2")(y)
        return nn.with_logical_constraint(x + y, ("batch", "length", "embed_act")), keys_values


class TappedBlock(Block):
    """A block that also passes on the first P tokens that block `tap` made.

    Its x is (tokens [B, T, D], tapped tokens [B, P, D], number of blocks before this one). The
    tapped tokens are carried, not collected: a scan would collect the tokens of every layer.
    """

    tap: int = 0

    def __call__(
        self, x: Any, prefix: Prefix | None, mask: Mask | None, rope: Rope | None
    ) -> tuple[Any, Any]:
        """The new x, and the tokens' keys and values."""
        tokens, tapped, count = x
        tokens, keys_values = super().__call__(tokens, prefix, mask, rope)
        count = count + 1
        tapped = jnp.where(count == self.tap, tokens[:, : tapped.shape[1]], tapped)
        return (tokens, tapped, count), keys_values


class VisionTransformer(nn.Module):
    """Patch embedding, position table, blocks and final norm, each usable on its own.

    Attributes:
      config: the sizes.
      dtype: of the computation.
      scan: whether the blocks are scanned.
      remat: one of `layers.REMAT_POLICIES`.
      embed_patches: False leaves out the patch embedding (the decoder's trunk has none).
      tap: the block, 1 to L, whose tokens `run_tapped` returns; 0: none.
      table_std: standard deviation that the position table starts with.
      attention: one of `ops.attention.IMPLEMENTATIONS`.
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    embed_patches: bool = True
    tap: int = 0
    table_std: float = 0.02
    attention: str = "auto"

    def setup(self):
        c = self.config
        if self.embed_patches:
            self.patch_embed = layers.dense(c.width, ("pixels", "embed"), dtype=self.dtype)
        self.position_table = layers.table(
            self, "position_table", c.table_side**2, c.width, self.table_std
        )
        options = {
            "num_heads": c.num_heads,
            "mlp_dim": c.mlp_dim,
            "dtype": self.dtype,
            "implementation": self.attention,
        }
        block = Block
        if self.tap:
            block, options = TappedBlock, options | {"tap": self.tap}
        self.blocks = layers.Stack(block, options, c.depth, scan=self.scan, remat=self.remat)
        self.final_norm = layers.layer_norm()

    def positions(
        self, height: int, width: int, part: padded.Part | None = None
    ) -> Float[Array, "{height*width} D"]:
        """The position table resized to a grid of patches, or to a part of it; float32."""
        return interpolation.resize_position_table(self.position_table, height, width, part)

    def embed(self, images: Images) -> Patches:
        """Patch tokens, with their positions, of images in [-1, 1]."""
        size = self.config.patch_size
        height, width = images.shape[1] // size, images.shape[2] // size
        tokens = self.patch_embed(patches.patchify(images, size).astype(self.dtype))
        return (tokens + self.positions(height, width)).astype(self.dtype)

    def encode_patches(self, images: Images) -> tuple[Patches, LayerCache]:
        """Patch features before the final norm, and keys and values of every layer."""
        return self.blocks(self.embed(images))

    def run(
        self, tokens: Tokens, *, prefix: LayerCache | None = None, mask: Mask | None = None
    ) -> Tokens:
        """Embedded tokens after the blocks and the final norm, float32."""
        return self.run_tapped(tokens, 0, prefix=prefix, mask=mask)[0]

    def run_tapped(
        self,
        tokens: Tokens,
        length: int,
        *,
        prefix: LayerCache | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tokens, Float[Array, "B {length} D"] | None]:
        """What `run` returns, and the first `length` tokens after block `tap` (or None)."""
        x = (tokens, tokens[:, :length], jnp.int32(0)) if self.tap else tokens
        x, _ = self.blocks(x, prefix=prefix, mask=mask)
        tokens, tapped, _ = x if self.tap else (x, None, None)
        return self.final_norm(tokens), tapped

    def __call__(self, images: Images) -> Patches:
        """Patch features of images in [-1, 1], after the final norm; float32."""
        tokens, _ = self.encode_patches(images)
        return self.final_norm(tokens)


def teacher_features(model: VisionTransformer, params: Any, images: Images) -> Patches:
    """Patch features after two applications of the final norm, as published; float32.

    The alignment loss compares the first token with their mean over patches.
    """
    once = model.apply({"params": params}, images)
    twice = model.apply({"params": params}, once, method=lambda m, x: m.final_norm(x))
    return cast(jax.Array, twice)
