"""What is drawn for a step of the tokenizer: input size, token count, noise.

Shapes: B batch, n tokens of the step, N when the input has full size.
"""

import itertools
from typing import Any

import jax
from jaxtyping import Int, PRNGKeyArray

from detailflow_jax.models.tokenizer import Count, TokenizerConfig
from detailflow_jax.ops import Array, correction
from detailflow_jax.ops.input_sizes import InputSizes
from detailflow_jax.runtime.errors import ConfigError, raised_as


def tokens_by_size(config: Any, c: TokenizerConfig, sizes: InputSizes | None) -> dict[int, int]:
    """Input side in pixels -> how many tokens an image of it has (inverse resolution map).

    Args:
      config: of the task.
      c: of the network.
      sizes: dynamic input resolution; None: all inputs have the network's `image_size`.

    Raises:
      ConfigError: a size has no token count, is off the encoder's patches or above the network's,
        or `config.accumulate` does not divide its batches; the text names the field.
    """
    if sizes is None:
        return {c.image_size: c.num_tokens}
    found = {}
    for size in sizes.possible:
        field = "image_size" if size == sizes.usual else "dynamic.sizes"
        where = f"config.data.{field}: {size} px"
        if size > c.image_size:
            raise ConfigError(
                f"{where} is above config.model.image_size={c.image_size}, the largest size there "
                "is; make that larger, or leave this size out"
            )
        if size % c.encoder.patch_size:
            raise ConfigError(
                f"{where} is not a multiple of the encoder's patch, {c.encoder.patch_size} px"
            )
        images = sizes.images(size)
        if images % config.accumulate:
            raise ConfigError(
                f"{where} comes in batches of {images}, not a multiple of config.accumulate="
                f"{config.accumulate}; let it divide config.data.dynamic.multiple"
            )
        with raised_as(ConfigError, f"{where}: "):
            found[size] = c.resolutions.best_count(size)
    return found


def program_sizes(config: Any, c: TokenizerConfig) -> tuple[tuple[int, ...], ...]:
    """The sides in pixels that images are decoded to, ascending; together those of one program.

    Raises:
      ConfigError: `config.decode_buckets` is below 0.
    """
    number = config.get("decode_buckets", 0)
    if number < 0:
        raise ConfigError(f"config.decode_buckets={number}; expected 0 or more programs")
    sizes = sorted({c.resolutions.decoded_size(n) for n in c.resolutions.token_counts})
    bucket = (lambda size: -(-size * number // c.image_size)) if number else None
    return tuple(tuple(same) for _, same in itertools.groupby(sizes, bucket))


def draw_noise(
    key: PRNGKeyArray,
    c: TokenizerConfig,
    options: Any,
    batch: int,
    token_count: Count,
    num_tokens: int | None = None,
) -> tuple[correction.Span | None, Int[Array, "{batch} n"]]:
    """Noise spans, None without self-correction, and ranks among the nearest codes.

    `options` is `config.correction`; `num_tokens` is n, by default all N.
    """
    num_tokens = num_tokens or c.num_tokens
    position_key, choice_key = jax.random.split(key)
    span = None
    if options.enabled:
        span = correction.draw_span(
            position_key,
            batch,
            token_count,
            num_tokens=num_tokens,
            group_size=c.group_size,
            causal_num=c.causal,
            per_sample=options.noise_per_sample,
        )
    top = min(options.noise_top, c.codebook_size)
    return span, jax.random.randint(choice_key, (batch, num_tokens), 0, top)
