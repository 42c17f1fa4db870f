"""Training of the tokenizer: coarse-to-fine reconstruction, self-correction, alignment.

What is drawn for a step is in `tasks/tokenizer_plan.py`, the loss terms in `tasks/losses/`, the
step itself in `tasks/trainer.py`.

Shapes: B batch, N tokens (fewer where the input is smaller), R image side, S decoded side, d code
dimension.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, UInt8

from detailflow_jax.models import siglip
from detailflow_jax.models.tokenizer import Count, Tokenizer, TokenizerConfig
from detailflow_jax.ops import Array, correction, interpolation, padded, quantization
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops.input_sizes import InputSizes, input_sizes
from detailflow_jax.runtime.errors import ConfigError, raised_as
from detailflow_jax.tasks import Metrics, Plan, Task, TrainState, from_section, tokenizer_figures
from detailflow_jax.tasks.losses import Pass, Step
from detailflow_jax.tasks.tokenizer_figures import group_counts
from detailflow_jax.tasks.tokenizer_plan import draw_noise, program_sizes, tokens_by_size
from detailflow_jax.tasks.trainer import Trainer

USAGE_WINDOW = 65_536

TRAIN_ONLY = {"all": None, "decoder": ("decoder", "post_quant_conv")}
"""`config.train_only` -> the parts of the network that are trained; None: all of them."""


def model_config(model: Any) -> TokenizerConfig:
    """The `model` section of a config as the network's own dataclass.

    Raises:
      ConfigError: values that contradict each other.
    """
    fields = model.to_dict()
    for part in ("encoder", "decoder"):
        fields[part] = from_section(siglip.ViTConfig, fields.get(part), f"config.model.{part}")
    return from_section(TokenizerConfig, fields, "config.model")


def make(config: Any) -> Task:
    """The tokenizer task of a config (see `configs/tokenizer.py` for its fields).

    Raises:
      ConfigError: fields contradict each other; the text names them.
    """
    c = model_config(config.model)
    if config.correction.enabled and not c.causal_encoder:
        raise ConfigError(
            "config.model.causal_encoder=False: the second pass of self-correction shows codes to "
            "queries that come later, and here every query sees all; set "
            "config.correction.enabled=False or config.model.causal_encoder=True"
        )
    if config.train_only not in TRAIN_ONLY:
        raise ConfigError(
            f"config.train_only={config.train_only!r} is not one of {', '.join(TRAIN_ONLY)}"
        )
    smallest = c.resolutions.decoded_size(c.resolutions.token_counts[0])
    with raised_as(ConfigError):
        sizes = input_sizes(config.data, config.batch_size, config.seed)
    return TokenizerTrainer.task(
        config,
        Tokenizer(c),
        smallest,
        steady=sizes is None,
        parts=TRAIN_ONLY[config.train_only],
        sizes=sizes,
        tokens=tokens_by_size(config, c, sizes),
        programs=program_sizes(config, c),
    )


def forward(
    model: Tokenizer,
    rows: Any,
    key: PRNGKeyArray | None,
    *,
    size: int,
    token_count: Count,
    part: padded.Part | None = None,
) -> Step:
    """What a step makes of a batch, inside of `Tokenizer.apply`.

    Args:
      model: the bound network.
      rows: images float32 [B, R, R, 3]; target float32 [B, S, S, 3], the image as `token_count`
        tokens should give it; the span of the noise, or None for one pass without
        self-correction; choice int32 [B, N], ranks of the noise among the nearest codes.
      key: unused, nothing else is random.
      size: S; static.
      token_count: how many tokens are decoded; data, so that another count needs no compilation.
      part: of the target, if that is smaller than S, for the same reason.
    """
    del key
    images, target, span, choice = rows
    if span is None:
        codes, latents, passes = one_pass(model, images, choice.shape[1])
    else:
        codes, latents, passes = two_passes(model, images, span, choice)
    c, tapped = model.config, None
    if c.repa_layer:
        reconstruction, tapped = model.decode_tapped(latents, size, token_count, part)
    else:
        reconstruction = model.decode(latents, size, token_count, part)
    return Step(
        images=images,
        target=target,
        reconstruction=reconstruction,
        latents=latents,
        codes=codes,
        passes=passes,
        span=span,
        aligned=model.align(latents[: len(images), 0]) if c.teacher_width else None,
        tapped=tapped,
        part=part,
    )


def one_pass(
    model: Tokenizer, images: Float[Array, "B R R 3"], num_tokens: int
) -> tuple[Int[Array, "B N"], Float[Array, "B N d"], tuple[Pass, ...]]:
    """Encoding without self-correction.

    Returns:
      codes; what is decoded, straight-through; the pass.
    """
    z = model.first_pass(model.encode_patches(images), num_tokens)
    distances = model.distances(z)
    codes = quantization.nearest_codes(distances)
    entries = model.lookup(codes)
    return codes, quantization.straight_through(entries, z), (Pass(z, entries, distances),)


def two_passes(
    model: Tokenizer,
    images: Float[Array, "B R R 3"],
    span: correction.Span,
    choice: Int[Array, "B N"],
) -> tuple[Int[Array, "B N"], Float[Array, "2*B N d"], tuple[Pass, ...]]:
    """Encoding with the paper's self-correction training.

    In the corrected half only the tokens after the noise pass a gradient to the encoder: what was
    shown to it is taken as given (published behaviour).

    Returns:
      clean codes; clean and corrected sequences along the batch, straight-through; both passes.
    """
    pair = model.encode_pair(images, span, choice)
    clean = Pass(pair.z, model.lookup(pair.triplet[..., 0]), pair.distances)
    corrected = Pass(pair.corrected_z, model.lookup(pair.triplet[..., 2]), pair.corrected_distances)
    shown = jax.lax.stop_gradient(pair.shown)
    later = quantization.straight_through(corrected.entries, corrected.z)
    latents = jnp.concatenate(
        [
            quantization.straight_through(clean.entries, clean.z),
            correction.splice(span, shown, shown, later),
        ]
    )
    return pair.triplet[..., 0], latents, (clean, corrected)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TokenizerTrainer(Trainer):
    """The functions of a `Task` for what a config makes of the tokenizer.

    Attributes:
      sizes: dynamic input resolution, or None.
      tokens: input side -> how many tokens encode it.
      programs: sides that images are decoded to, together those of one program.
    """

    sizes: InputSizes | None
    tokens: Mapping[int, int]
    programs: tuple[tuple[int, ...], ...]

    last_kernel = ("decoder", "to_pixels", "kernel")
    keys = ("teacher", "lpips", "adversarial")

    def init(self, key: PRNGKeyArray) -> TrainState:
        """See `Task`."""
        side = self.model.config.image_size
        window = jnp.full((USAGE_WINDOW,), -1, jnp.int32)
        return self.start(key, jnp.zeros((1, side, side, 3)), window=window)

    def plan(self, step: int) -> Plan:
        """See `Task`.

        The variant is the side of what is decoded; (input side, that one) if both vary.
        """
        resolutions = self.model.config.resolutions
        side = self.sizes.size(step) if self.sizes else resolutions.image_size
        rng = np.random.default_rng((self.config.seed, step))
        most = self.tokens[side]
        count = resolutions.draw_count(rng, self.config.full_probability, most)
        size = resolutions.decoded_size(count)
        low = side if count == most else resolutions.resolution(count)
        matrix = interpolation.degradation_matrix(side, low, size)
        [together] = [sides for sides in self.programs if size in sides]
        together = tuple(one for one in together if one <= side)
        part = None
        if len(together) > 1:
            part = padded.Part(np.int32(together.index(size)), together)
            matrix = np.pad(matrix, ((0, together[-1] - size), (0, 0)))
        variant = (side, together[-1]) if self.sizes else together[-1]
        return variant, {"token_count": np.int32(count), "degrade": matrix, "part": part}

    def train_step(
        self, state: TrainState, batch: Any, plan: Mapping[str, Any], *, variant: Any
    ) -> tuple[TrainState, Metrics]:
        """See `Task`.

        Raises:
          ConfigError: images of another size than the variant's.
        """
        config, c = self.config, self.model.config
        side, size = variant if self.sizes else (c.image_size, variant)
        images = pixels.to_float(batch["image"])
        if images.shape[1:3] != (side, side):
            raise ConfigError(
                f"the step expects images of {side} x {side} px, the batch has "
                f"{images.shape[1]} x {images.shape[2]}; see config.data.image_size"
            )
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        count = jnp.asarray(plan["token_count"])
        noise = draw_noise(key, c, config.correction, len(images), count, self.tokens[side])
        target = interpolation.apply_matrices(images, plan["degrade"], plan["degrade"])
        made = functools.partial(forward, size=size, token_count=count, part=plan["part"])
        new, metrics, codes = self.step(state, (images, target, *noise), key, made)
        window = quantization.remember_codes(state.extra["window"], codes)
        metrics["codebook_usage"] = quantization.codebook_usage(window, c.codebook_size)
        return new.replace(extra=new.extra | {"window": window}), metrics

    def figures(self, state: TrainState, batch: Any) -> Mapping[str, UInt8[Array, "_ _ 3"]]:
        """Pictures of the first 8 images of a batch; see `tokenizer_figures.draw`."""
        images = jnp.asarray(batch["image"][:8])
        counts = group_counts(self.model.config, tokens=self.tokens[images.shape[1]])
        return tokenizer_figures.draw(self.model, state.params, images, counts)
