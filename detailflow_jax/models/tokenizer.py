"""The DetailFlow tokenizer: an image as N codes ordered from global structure to fine detail.

Shapes: B batch, P patches, N tokens, g group, c causal tokens, V codes, d code dimension, D width.
Float images are [B, H, W, 3] in [-1, 1].
"""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models import layers
from detailflow_jax.models.siglip import VisionTransformer, ViTConfig
from detailflow_jax.ops import correction, masks, patches, quantization, resolution

PUBLISHED_ENCODER = ViTConfig(depth=12)
PUBLISHED_DECODER = ViTConfig(width=768, depth=12, num_heads=12, mlp_dim=3072)
REPA_WIDTH = 2048  # hidden, of the projection of the decoder's tokens


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Everything that shapes the network. The defaults are the published 128-token tokenizer."""

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
    repa_layer: int = 0  # after so many decoder blocks its tokens are aligned too; 0: never
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        masks.check_groups(self.num_tokens, self.group_size, self.causal)
        if not 0 <= self.repa_layer <= self.decoder.depth:
            raise ValueError(
                f"repa_layer={self.repa_layer} is not one of the {self.decoder.depth} decoder "
                "blocks, counted from 1 (0: none)"
            )
        if self.repa_layer and not self.teacher_width:
            raise ValueError(f"repa_layer={self.repa_layer} needs teacher_width, the teacher's")

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


def _table(module: nn.Module, name: str, rows: int, width: int) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("positions", "embed"))
    return module.param(name, init, (rows, width))


class Encoder(nn.Module):
    """Image patches and, looking at them, N learned queries.

    Patches see patches only, so their stream does not depend on the queries: it runs once, and its
    keys and values serve both the clean and the self-correcting pass. This is the published mask
    (patches -> patches; queries -> all patches and earlier queries) without its masked half.
    """

    config: TokenizerConfig

    def setup(self):
        c = self.config
        self.trunk = VisionTransformer(c.encoder, jnp.dtype(c.dtype), c.scan, c.remat)
        self.latent_tokens = _table(self, "latent_tokens", c.num_tokens, c.encoder.width)
        self.refined_tokens = _table(self, "refined_tokens", c.num_tokens, c.encoder.width)
        self.latent_positions = _table(self, "latent_positions", c.num_tokens, c.encoder.width)

    def encode_patches(self, images):
        """The patch stream: (tokens before the final norm, keys and values per layer)."""
        return self.trunk.encode_patches(images)

    def read(self, patch_kv, queries):
        """Queries [B, n, D], n <= N, over the patch stream -> hidden states, normed at the end."""
        c, length = self.config, queries.shape[1]
        mask = None
        if c.causal_encoder:
            num_patches = jax.tree.leaves(patch_kv)[0].shape[-3]
            among = masks.group_mask(c.num_tokens, c.group_size, c.causal)[:length, :length]
            mask = np.concatenate([np.ones((length, num_patches), bool), among], axis=1)[None, None]
        queries = (queries + self.latent_positions[:length]).astype(c.dtype)
        return self.trunk.run(queries, prefix=patch_kv, mask=mask)

    def first_queries(self, batch: int, length: int | None = None):
        """The first n (default all) learned queries of the clean pass: [B, n, D]."""
        queries = self.latent_tokens[:length]
        return jnp.broadcast_to(queries, (batch, *queries.shape))


class Decoder(nn.Module):
    """A grid of mask tokens and the first n projected codes, fully bidirectional, to pixels."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, codes, height: int, width: int, num_tokens=None):
        """Projected codes [B, N, D] -> float32 image of height x width patches.

        `num_tokens` (int32 scalar or [B], data) hides the codes from n on; None shows all.

        Returns:
          the image, and the grid's tokens after block `repa_layer`, [B, P, D], or None.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        trunk = VisionTransformer(
            c.decoder, dtype, c.scan, c.remat, embed_patches=False, tap=c.repa_layer, name="trunk"
        )
        mask_token = _table(self, "mask_token", 1, c.decoder.width)
        latent_positions = _table(self, "latent_positions", c.num_tokens, c.decoder.width)
        batch, length, _ = codes.shape
        grid = jnp.broadcast_to(
            mask_token + trunk.positions(height, width),
            (batch, height * width, c.decoder.width),
        )
        tokens = jnp.concatenate([grid, codes + latent_positions[:length]], axis=1)
        mask = None
        if num_tokens is not None:
            shown = jnp.arange(length) < jnp.reshape(num_tokens, (-1, 1))
            mask = jnp.pad(shown, ((0, 0), (height * width, 0)), constant_values=True)
            mask = mask[:, None, None, :]
        hidden, tapped = trunk.run_tapped(tokens.astype(dtype), height * width, mask=mask)
        hidden = hidden[:, : height * width]
        pixels = layers.dense(
            c.decoder.patch_size**2 * 3, ("embed", "pixels"), dtype=dtype, name="to_pixels"
        )(hidden.astype(dtype))
        pixels = pixels.astype(jnp.float32)
        return patches.unpatchify(pixels, c.decoder.patch_size, height, width), tapped


def _unit_codebook(key, shape, dtype=jnp.float32):
    """Uniform in +-1/V, then L2-normalised, as published."""
    bound = 1.0 / shape[0]
    return quantization.normalize(jax.random.uniform(key, shape, dtype, -bound, bound))


def _projection(axis: str, widths: tuple[int, ...], dtype) -> list[nn.Dense]:
    """The dense layers of an MLP whose input bears the logical name `axis`."""
    return [
        layers.dense(w, (axis, "mlp") if i == 0 else ("mlp", "embed"), dtype=dtype)
        for i, w in enumerate(widths)
    ]


def _project(mlp: list[nn.Dense], x: jax.Array) -> jax.Array:
    for i, layer in enumerate(mlp):
        x = layer(nn.silu(x) if i else x)
    return x


class Pair(typing.NamedTuple):
    """What two encoder passes give; normalised latents [B, N, d], distances [B, N, V].

    `shown` are the codes that the second pass saw (clean, then noisy inside the span). `triplet`,
    int32 [B, N, 3], is what the generator learns from: clean codes; its input (clean, noisy,
    corrected); its label (clean up to the end of the noise, then corrected).
    """

    z: jax.Array
    distances: jax.Array
    corrected_z: jax.Array
    corrected_distances: jax.Array
    shown: jax.Array
    triplet: jax.Array


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder; every method is a pure function of (params, inputs)."""

    config: TokenizerConfig

    def setup(self):
        c = self.config
        f32 = jnp.float32  # what meets the quantizer is never rounded
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = layers.dense(c.codebook_dim, ("embed", "code"), dtype=f32)
        self.post_quant_conv = layers.dense(c.decoder.width, ("code", "embed"), dtype=f32)
        self.refine_conv = layers.dense(c.encoder.width, ("code", "embed"), dtype=f32)
        self.codebook = self.param(
            "codebook",
            nn.with_logical_partitioning(_unit_codebook, ("vocab", "code")),
            (c.codebook_size, c.codebook_dim),
        )
        if c.teacher_width:
            widths = (1024, 1024, c.teacher_width)
            self.align_layers = _projection("code", widths, f32)
        if c.repa_layer:
            widths = (REPA_WIDTH, REPA_WIDTH, c.teacher_width)
            self.repa_layers = _projection("embed", widths, jnp.dtype(c.dtype))

    # ---- encoding -------------------------------------------------------------------------

    def encode_patches(self, images):
        """Images -> the patch stream's keys and values, shared by both encoder passes."""
        return self.encoder.encode_patches(images)[1]

    def first_pass(self, patch_kv, num_tokens: int | None = None):
        """Clean latents of the first n tokens (default all): normalised z, float32 [B, n, d]."""
        batch = jax.tree.leaves(patch_kv)[0].shape[-4]
        hidden = self.encoder.read(patch_kv, self.encoder.first_queries(batch, num_tokens))
        return quantization.normalize(self.quant_conv(hidden))

    def second_pass(self, patch_kv, span: correction.Span, shown):
        """Latents of the self-correcting pass, which is shown what has been sampled so far.

        Args:
          patch_kv: from `encode_patches`.
          span: the noise; codes before its end are shown.
          shown: normalised codes [B, n, d], n <= N: clean before the span, noisy inside.

        Returns:
          normalised z, float32 [B, n, d]; only positions from span.stop on are meant to be used.
        """
        length = shown.shape[1]
        shown = self.refine_conv(jax.lax.stop_gradient(shown))
        later = correction.after(span, length)[..., None]
        queries = jnp.where(later, self.encoder.refined_tokens[:length], shown)
        return quantization.normalize(self.quant_conv(self.encoder.read(patch_kv, queries)))

    def encode_pair(self, images, span: correction.Span, choice) -> "Pair":
        """Both passes over an image, clean and correcting for noise: self-correction training.

        Args:
          images: [B, H, W, 3] in [-1, 1].
          span: where noise strikes.
          choice: int32 [B, n], the perturbed token's rank among the nearest codes; used inside
            the span only. The image is encoded in so many tokens, n <= N.
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

    def encode(self, images, num_tokens: int | None = None):
        """Images [B, H, W, 3] in [-1, 1] -> the first n codes (default all), int32 [B, n]."""
        z = self.first_pass(self.encode_patches(images), num_tokens)
        return quantization.nearest_codes(self.distances(z))

    # ---- quantizing -----------------------------------------------------------------------

    def distances(self, z):
        """Squared distances of normalised z to every normalised code: float32 [B, N, V]."""
        return quantization.code_distances(z, quantization.normalize(self.codebook))

    def lookup(self, codes):
        """Codes int32 [..., N] -> normalised entries, float32 [..., N, d]."""
        return quantization.normalize(jnp.take(self.codebook, codes, axis=0))

    def align(self, first_code):
        """The first quantised code [B, d] in the teacher's feature space: [B, teacher_width]."""
        return _project(self.align_layers, first_code)

    # ---- decoding -------------------------------------------------------------------------

    def decode(self, latents, size: int, num_tokens=None):
        """Normalised codes [B, n, d] -> float32 images [B, size, size, 3], about [-1, 1].

        Args:
          latents: quantised, normalised codes; n <= N.
          size: side in pixels, a multiple of the decoder's patch (static: one compile a size).
          num_tokens: hide tokens from this count on (data), so that one program serves many counts.
        """
        return self._decode(latents, size, num_tokens)[0]

    def decode_tapped(self, latents, size: int, num_tokens=None):
        """`decode`, and the grid's tokens after block `repa_layer` in the teacher's space.

        Returns:
          images, and [B, P, teacher_width], one a patch.
        """
        images, tapped = self._decode(latents, size, num_tokens)
        return images, _project(self.repa_layers, tapped)

    def _decode(self, latents, size: int, num_tokens):
        side, rest = divmod(size, self.config.decoder.patch_size)
        if rest or side < 1:
            raise ValueError(
                f"size={size} is not a positive multiple of the decoder's patch "
                f"({self.config.decoder.patch_size} px)"
            )
        return self.decoder(self.post_quant_conv(latents), side, side, num_tokens)

    def decode_codes(self, codes, size: int, num_tokens=None):
        """Codes int32 [B, n] -> images; see `decode`."""
        return self.decode(self.lookup(codes), size, num_tokens)

    def __call__(self, images):
        """Touches every parameter once; used to initialise."""
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
