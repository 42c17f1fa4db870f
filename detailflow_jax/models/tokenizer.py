"""The DetailFlow tokenizer: an image as N codes ordered from global structure to fine detail.

Shapes: B batch, P patches, N tokens, n <= N tokens in use, V codes, d code dimension, D width.
Sizes: g group, c causal tokens. Float images are [B, H, W, 3] in [-1, 1].
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from detailflow_jax.models import layers
from detailflow_jax.models.layers import LayerCache
from detailflow_jax.models.siglip import VisionTransformer, ViTConfig
from detailflow_jax.ops import Array, correction, masks, padded, patches, quantization, resolution

Images = Float[Array, "B H W 3"]
Latents = Float[Array, "B n d"]
Codes = Int[Array, "B n"]
Count = Int[Array, ""] | Int[Array, " B"] | int

PUBLISHED_ENCODER = ViTConfig(depth=12)
PUBLISHED_DECODER = ViTConfig(width=768, depth=12, num_heads=12, mlp_dim=3072)
REPA_WIDTH = 2048  # hidden, of the projection of the decoder's tokens


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes and options of the network. The defaults are the published 128-token tokenizer."""

    image_size: int = 256
    num_tokens: int = 128
    group_size: int = 8
    causal_num: int | None = None  # None: one group; 0: the first group is bidirectional too
    codebook_size: int = 8192
    codebook_dim: int = 8
    resolution_power: float = 1.5
    encoder: ViTConfig = PUBLISHED_ENCODER
    decoder: ViTConfig = PUBLISHED_DECODER
    causal_encoder: bool = True  # False: every query sees every query (the paper's baseline)
    teacher_width: int = 0  # of the alignment teacher; 0: no projection for alignment
    overlap: bool = False  # the decoder's patches paint over their borders: `patches.blend`
    repa_layer: int = 0  # the decoder block whose tokens are aligned too, from 1; 0: none
    # What position tables and queries start with. 0.02 suits patches of a trained encoder; from
    # scratch they vanish beside the patches for hundreds of steps.
    table_std: float = 0.02
    dtype: str = "float32"
    attention: str = "auto"  # one of `ops.attention.IMPLEMENTATIONS`
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        masks.check_groups(self.num_tokens, self.group_size, self.causal)
        if self.image_size % self.decoder.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is no multiple of the decoder's "
                f"patch_size={self.decoder.patch_size}"
            )
        if self.overlap and self.decoder.patch_size % 2:
            raise ValueError(
                "overlap=True needs an even patch_size of the decoder, not "
                f"{self.decoder.patch_size}"
            )
        if not 0 <= self.repa_layer <= self.decoder.depth:
            raise ValueError(
                f"repa_layer={self.repa_layer} is not one of the {self.decoder.depth} decoder "
                "blocks, counted from 1 (0: none)"
            )
        if self.repa_layer and not self.teacher_width:
            raise ValueError(
                f"repa_layer={self.repa_layer} needs teacher_width, the width of the teacher"
            )

    @property
    def causal(self) -> int:
        """c, the number of tokens that are generated one by one."""
        return self.group_size if self.causal_num is None else self.causal_num

    @property
    def resolutions(self) -> resolution.ResolutionMap:
        """The map from token counts to image sizes."""
        return resolution.ResolutionMap(
            self.image_size,
            self.num_tokens,
            self.group_size,
            self.causal,
            self.decoder.patch_size,
            self.resolution_power,
        )


class Encoder(nn.Module):
    """A stream of image patches, and N learned queries that look at it.

    Patches see patches only, so their stream does not depend on the queries. It runs once, and its
    keys and values serve both the clean and the self-correcting pass. This equals the published
    mask (patches see patches; queries see all patches and the earlier queries) without its masked
    half.
    """

    config: TokenizerConfig

    def setup(self):
        c = self.config
        self.trunk = VisionTransformer(
            c.encoder,
            jnp.dtype(c.dtype),
            c.scan,
            c.remat,
            table_std=c.table_std,
            attention=c.attention,
        )
        self.latent_tokens = layers.table(
            self, "latent_tokens", c.num_tokens, c.encoder.width, c.table_std
        )
        self.refined_tokens = layers.table(
            self, "refined_tokens", c.num_tokens, c.encoder.width, c.table_std
        )
        self.latent_positions = layers.table(
            self, "latent_positions", c.num_tokens, c.encoder.width, c.table_std
        )

    def encode_patches(self, images: Images) -> tuple[Float[Array, "B P D"], LayerCache]:
        """The patch stream: tokens before the final norm, and keys and values of every layer."""
        return self.trunk.encode_patches(images)

    def read(self, patch_kv: LayerCache, queries: Float[Array, "B n D"]) -> Float[Array, "B n D"]:
        """The queries after reading the patch stream and the final norm, float32."""
        c, length = self.config, queries.shape[1]
        mask = None
        if c.causal_encoder:
            num_patches = jax.tree.leaves(patch_kv)[0].shape[-3]
            among = masks.group_mask(c.num_tokens, c.group_size, c.causal)[:length, :length]
            mask = np.concatenate([np.ones((length, num_patches), bool), among], axis=1)[None, None]
        queries = (queries + self.latent_positions[:length]).astype(c.dtype)
        return self.trunk.run(queries, prefix=patch_kv, mask=mask)

    def first_queries(self, batch: int, length: int | None = None) -> Float[Array, "{batch} n D"]:
        """The first n learned queries of the clean pass (default all)."""
        queries = self.latent_tokens[:length]
        return jnp.broadcast_to(queries, (batch, *queries.shape))


class Decoder(nn.Module):
    """A bidirectional transformer from a grid of mask tokens and projected codes to pixels."""

    config: TokenizerConfig

    @nn.compact
    def __call__(
        self,
        codes: Float[Array, "B n D"],
        height: int,
        width: int,
        num_tokens: Count | None = None,
        part: padded.Part | None = None,
    ) -> tuple[Images, Float[Array, "B {height*width} D"] | None]:
        """The image of height x width patches that projected codes stand for, float32.

        Args:
          codes: projected codes.
          height: of the image, in patches.
          width: of the image, in patches.
          num_tokens: hides the codes from this count on (data); None shows all.
          part: of the image, if it is to be decoded in the top left of a larger grid; in pixels.

        Returns:
          The image, zero outside of the part; and the grid's tokens after block `repa_layer` (None
          if that is 0).
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        trunk = VisionTransformer(
            c.decoder,
            dtype,
            c.scan,
            c.remat,
            embed_patches=False,
            tap=c.repa_layer,
            table_std=c.table_std,
            attention=c.attention,
            name="trunk",
        )
        mask_token = layers.table(self, "mask_token", 1, c.decoder.width)
        latent_positions = layers.table(
            self, "latent_positions", c.num_tokens, c.decoder.width, c.table_std
        )
        batch, length, _ = codes.shape
        on_grid = padded.over(part, c.decoder.patch_size)
        grid = mask_token + trunk.positions(height, width, on_grid)
        grid = jnp.broadcast_to(grid, (batch, *grid.shape))
        tokens = jnp.concatenate([grid, codes + latent_positions[:length]], axis=1)  # [B, P + n, D]
        mask = None
        if num_tokens is not None or on_grid:
            count = length if num_tokens is None else num_tokens
            shown = jnp.arange(length) < jnp.reshape(count, (-1, 1))
            mask = jnp.pad(shown, ((0, 0), (height * width, 0)), constant_values=True)
            if on_grid:
                mask = mask.at[:, : height * width].set(on_grid.inside.ravel())
            mask = mask[:, None, None, :]  # [B or 1, 1, 1, P + n]
        hidden, tapped = trunk.run_tapped(tokens.astype(dtype), height * width, mask=mask)
        hidden = hidden[:, : height * width]
        size = c.decoder.patch_size
        blend = functools.partial(patches.blend, part=on_grid)
        painted, join = (2 * size, blend) if c.overlap else (size, patches.unpatchify)
        to_pixels = layers.dense(painted**2 * 3, ("embed", "pixels"), dtype=dtype, name="to_pixels")
        pixels = to_pixels(hidden.astype(dtype)).astype(jnp.float32)  # [B, P, painted^2 * 3]
        if on_grid:
            pixels = jnp.where(on_grid.inside.reshape(-1, 1), pixels, 0)
        return join(pixels, size, height, width), tapped


def _unit_codebook(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Codes drawn uniformly from +-1/V, then L2-normalised, as published."""
    bound = 1.0 / shape[0]
    return quantization.normalize(jax.random.uniform(key, shape, dtype, -bound, bound))


def _projection(axis: str, widths: tuple[int, ...], dtype: typing.Any) -> list[nn.Dense]:
    """The dense layers of an MLP; `axis` is the logical name of its input."""
    return [
        layers.dense(w, (axis, "mlp") if i == 0 else ("mlp", "embed"), dtype=dtype)
        for i, w in enumerate(widths)
    ]


def _project(mlp: Sequence[nn.Dense], x: Array) -> Array:
    for i, layer in enumerate(mlp):
        x = layer(nn.silu(x) if i else x)
    return x


class Pair(typing.NamedTuple):
    """What the clean and the self-correcting encoder pass give.

    Attributes:
      z: normalised latents of the clean pass, float32 [B, n, d].
      distances: of `z` to all codes, float32 [B, n, V].
      corrected_z: normalised latents of the self-correcting pass, float32 [B, n, d].
      corrected_distances: of `corrected_z` to all codes, float32 [B, n, V].
      shown: entries of the codes that the second pass saw (noisy inside the span), [B, n, d].
      triplet: int32 [B, n, 3], what the generator learns from: the clean codes; its input (clean,
        then noisy, then corrected codes); its label (clean up to the end of the noise, then
        corrected codes).
    """

    z: Array
    distances: Array
    corrected_z: Array
    corrected_distances: Array
    shown: Array
    triplet: Array


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder."""

    config: TokenizerConfig

    def setup(self):
        c = self.config
        f32 = jnp.float32  # the quantizer's inputs and outputs are never rounded
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = layers.dense(c.codebook_dim, ("embed", "code"), dtype=f32)
        self.post_quant_conv = layers.dense(c.decoder.width, ("code", "embed"), dtype=f32)
        self.refine_conv = layers.dense(c.encoder.width, ("code", "embed"), dtype=f32)
        shape = (c.codebook_size, c.codebook_dim)
        self.codebook = layers.param(self, "codebook", _unit_codebook, ("vocab", "code"), shape)
        if c.teacher_width:
            widths = (1024, 1024, c.teacher_width)
            self.align_layers = _projection("code", widths, f32)
        if c.repa_layer:
            widths = (REPA_WIDTH, REPA_WIDTH, c.teacher_width)
            self.repa_layers = _projection("embed", widths, jnp.dtype(c.dtype))

    # ---- encoding -------------------------------------------------------------------------

    def encode_patches(self, images: Images) -> LayerCache:
        """The patch stream's keys and values, which both encoder passes read."""
        return self.encoder.encode_patches(images)[1]

    def first_pass(self, patch_kv: LayerCache, num_tokens: int | None = None) -> Latents:
        """Normalised latents of the first n tokens (default all), float32."""
        batch = jax.tree.leaves(patch_kv)[0].shape[-4]
        hidden = self.encoder.read(patch_kv, self.encoder.first_queries(batch, num_tokens))
        return quantization.normalize(self.quant_conv(hidden))

    def second_pass(self, patch_kv: LayerCache, span: correction.Span, shown: Latents) -> Latents:
        """Normalised latents of the self-correcting pass, which sees the codes sampled so far.

        Args:
          patch_kv: from `encode_patches`.
          span: the noise; codes before its end are shown.
          shown: normalised codes, clean before the span and noisy inside it.

        Returns:
          float32 latents; only the positions from `span.stop` on are meant to be used.
        """
        length = shown.shape[1]
        shown = self.refine_conv(jax.lax.stop_gradient(shown))
        later = correction.after(span, length)[..., None]
        queries = jnp.where(later, self.encoder.refined_tokens[:length], shown)
        return quantization.normalize(self.quant_conv(self.encoder.read(patch_kv, queries)))

    def encode_pair(self, images: Images, span: correction.Span, choice: Codes) -> Pair:
        """Both passes over an image, clean and self-correcting, in n tokens.

        Args:
          images: in [-1, 1].
          span: where noise strikes.
          choice: rank of each perturbed token among the nearest codes; used inside the span only.
        """
        patch_kv = self.encode_patches(images)
        z = self.first_pass(patch_kv, choice.shape[1])
        distances = self.distances(z)
        clean = quantization.nearest_codes(distances)
        noisy = correction.splice(span, clean, correction.near_code(distances, choice), clean)
        shown = self.lookup(noisy)
        corrected_z = self.second_pass(patch_kv, span, shown)
        corrected_distances = self.distances(corrected_z)
        corrected = quantization.nearest_codes(corrected_distances)
        return Pair(
            z=z,
            distances=distances,
            corrected_z=corrected_z,
            corrected_distances=corrected_distances,
            shown=shown,
            triplet=jnp.stack(
                [
                    clean,
                    correction.splice(span, noisy, noisy, corrected),
                    correction.splice(span, clean, clean, corrected),
                ],
                axis=-1,
            ),
        )

    def encode(self, images: Images, num_tokens: int | None = None) -> Codes:
        """The first n codes (default all) of images in [-1, 1], int32."""
        z = self.first_pass(self.encode_patches(images), num_tokens)
        return quantization.nearest_codes(self.distances(z))

    # ---- quantizing -----------------------------------------------------------------------

    def distances(self, z: Float[Array, "*batch d"]) -> Float[Array, "*batch V"]:
        """Squared distances of normalised latents to every normalised code, float32."""
        return quantization.code_distances(z, quantization.normalize(self.codebook))

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Normalised codebook entries of the codes, float32."""
        return quantization.normalize(jnp.take(self.codebook, codes, axis=0))

    def align(self, first_code: Float[Array, "B d"]) -> Float[Array, "B teacher_width"]:
        """The first quantised code in the teacher's feature space."""
        return _project(self.align_layers, first_code)

    # ---- decoding -------------------------------------------------------------------------

    def decode(
        self,
        latents: Latents,
        size: int,
        num_tokens: Count | None = None,
        part: padded.Part | None = None,
    ) -> Float[Array, "B {size} {size} 3"]:
        """Images of quantised, normalised codes; float32, about [-1, 1].

        Args:
          latents: normalised codebook entries.
          size: side in pixels, a multiple of the decoder's patch (static: one compile per size).
          num_tokens: hides tokens from this count on (data, so that one program serves all counts).
          part: the true side, as data, of images at the top left; the rest is zero. None: `size`.

        Raises:
          ValueError: if `size` is not a positive multiple of the patch.
        """
        return self._decode(latents, size, num_tokens, part)[0]

    def decode_tapped(
        self,
        latents: Latents,
        size: int,
        num_tokens: Count | None = None,
        part: padded.Part | None = None,
    ) -> tuple[Images, Float[Array, "B P teacher_width"]]:
        """The images, and the patches' tokens after block `repa_layer` in the teacher's space."""
        images, tapped = self._decode(latents, size, num_tokens, part)
        return images, _project(self.repa_layers, tapped)

    def _decode(
        self, latents: Array, size: int, num_tokens: Count | None, part: padded.Part | None
    ):
        side, rest = divmod(size, self.config.decoder.patch_size)
        if rest or side < 1:
            raise ValueError(
                f"size={size} is not a positive multiple of the decoder's patch "
                f"({self.config.decoder.patch_size} px)"
            )
        return self.decoder(self.post_quant_conv(latents), side, side, num_tokens, part)

    def decode_codes(
        self, codes: Codes, size: int, num_tokens: Count | None = None
    ) -> Float[Array, "B {size} {size} 3"]:
        """Images of codes; see `decode`."""
        return self.decode(self.lookup(codes), size, num_tokens)

    def __call__(self, images: Images):
        """Uses every parameter once, to initialise them."""
        batch = images.shape[0]
        patch_kv = self.encode_patches(images)
        z = self.first_pass(patch_kv)
        codes = self.lookup(quantization.nearest_codes(self.distances(z)))
        span = correction.no_span(batch, self.config.num_tokens)
        self.second_pass(patch_kv, span, codes)
        if self.config.teacher_width:
            self.align(codes[:, 0])
        decode = self.decode_tapped if self.config.repa_layer else self.decode
        return decode(codes, self.config.image_size)
