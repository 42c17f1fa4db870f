"""What models take, checked before anything is compiled.

Shapes: B images or samples, H x W pixels, n tokens, C latent channels, i side of a scale.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from detailflow_jax.inference.errors import InputError, InputTypeError
from detailflow_jax.models.flow_sampler import Known
from detailflow_jax.models.flowar import FlowARConfig
from detailflow_jax.ops import Array
from detailflow_jax.ops.objectives import OBJECTIVES
from detailflow_jax.runtime.errors import MOST_SEED, in_range

_RANGE = 8.0  # of images of floats, beyond which they are no images in [-1, 1]
ArrayLike = Array | Sequence
"""What methods of models take: arrays, or nested sequences of numbers."""


def check_whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Returns a whole number as an int; those of NumPy, and 2.0, are taken too.

    Raises:
      InputError: it is none, or not from `least` to `most`.
    """
    found = int(value) if isinstance(value, float | np.floating) and value % 1 == 0 else value
    try:
        found = math.nan if isinstance(value, bool | np.bool_) else operator.index(found)
    except TypeError:
        found = math.nan
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if not low <= found <= high:
        wanted = in_range("a whole number", least, most)
        raise InputError(f"{_shown(name, value)}, expected {wanted}")
    return int(found)


def check_seed(seed: Any) -> int:
    """Returns a seed as an int; raises InputError unless it is one."""
    return check_whole("seed", seed, 0, MOST_SEED)


def check_number(name: str, value: Any, expected: str = "a finite number") -> float:
    """Returns a finite number as a float; raises InputError with what is `expected` for others."""
    try:
        found = math.nan if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{_shown(name, value)}, expected {expected}")
    return found


def _shown(name: str, value: Any) -> str:
    return f"{name}={value!r}" if isinstance(value, str | bytes) else f"{name}={value}"


def as_array(name: str, value: Any, dtype: Any = None) -> np.ndarray:
    """Returns numbers as a NumPy array; raises InputError where NumPy makes none of them."""
    try:
        return np.asarray(value, dtype)
    except (ValueError, TypeError, RuntimeError) as error:  # The last is PyTorch's.
        raise InputError(f"{name} cannot become an array: {error}") from error


def as_images(images: Any) -> np.ndarray:
    """Returns images as an array; plain numbers 0..255 in lists are uint8."""
    found = as_array("images", images)
    listed = not hasattr(images, "dtype") and found.dtype.kind == "i"
    is_byte = listed and found.min(initial=0) >= 0 and found.max(initial=0) <= 255
    return found.astype(np.uint8) if is_byte else found


def check_images(images: np.ndarray, channels: int, stride: int = 1) -> None:
    """Raises InputError unless images are [B, H, W, channels] with sides that stride divides.

    Floats have to be about [-1, 1]: decoded images leave this range by a half, others by far more.
    Other types are an InputTypeError.
    """
    known = images.dtype == np.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
    if images.ndim and not known:
        raise InputTypeError(f"images are {images.dtype}; expected uint8, or floats in [-1, 1]")
    if jnp.issubdtype(images.dtype, jnp.floating) and not np.abs(images).max(initial=0) <= _RANGE:
        raise InputError(
            f"images reach {np.abs(images).max():g}: expected floats about [-1, 1], or uint8 in "
            "0..255"
        )
    if images.ndim != 4 or images.shape[-1] != channels:
        raise InputError(f"images have shape {images.shape}, expected [B, H, W, {channels}]")
    if images.shape[1] % stride or images.shape[2] % stride:
        raise InputError(
            f"images are {images.shape[1]} x {images.shape[2]}, expected sides that are multiples "
            f"of {stride} px"
        )


def check_codes(codes: np.ndarray, codebook_size: int) -> None:
    """Raises InputError unless codes are int [B, n] in [0, codebook_size)."""
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes are {codes.dtype} {codes.shape}, expected integers [B, n]")
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise InputError(
            f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {codebook_size}): "
            "are they of another tokenizer?"
        )


def check_vectors(vectors: np.ndarray, code_dim: int) -> None:
    """Raises InputError unless the vectors are finite floats [B, n, code_dim]."""
    if vectors.shape[-1] != code_dim or not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise InputError(
            f"vectors of codes are {vectors.dtype} {vectors.shape}, expected floats "
            f"[B, n, {code_dim}]"
        )
    if not np.isfinite(vectors).all():
        raise InputError("vectors of codes hold NaN or infinity")


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises InputError unless labels are class numbers [B], at least one."""
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are {labels.dtype} {labels.shape}, expected integers [B], B > 0")
    wrong = sorted({int(x) for x in labels if not 0 <= x < num_classes})
    if wrong:
        raise InputError(f"labels {wrong[:5]} are out of range, expected 0..{num_classes - 1}")


def check_steps(num_steps: Any) -> int | list[int]:
    """Returns a count of flow steps, or one per scale; raises InputError for other things."""
    if isinstance(num_steps, list | tuple | np.ndarray) and np.ndim(num_steps):
        return [check_whole("num_steps", count) for count in num_steps]
    return check_whole("num_steps", num_steps)


def check_flow_settings(low: float, high: float, solver: str, objective: str) -> None:
    """Raises InputError unless 0 <= low <= high <= 1 and the solver fits."""
    check_number("guidance_low", low)
    check_number("guidance_high", high)
    if not 0.0 <= low <= high <= 1.0:
        raise InputError(
            f"guidance_low={low}, guidance_high={high}: expected 0 <= low <= high <= 1"
        )
    solvers = OBJECTIVES[objective].solvers
    if solver not in solvers:
        raise InputError(
            f"solver={solver!r} is not one of {', '.join(solvers)}, which sample a model of "
            f"objective {objective!r}"
        )


def check_guidance(cfg_scale: Any) -> float:
    """Returns the guidance scale; raises InputError unless it is finite and at least 1."""
    expected = ">= 1 (1 means no guidance)"
    if check_number("cfg_scale", cfg_scale, expected) < 1.0:
        raise InputError(f"cfg_scale={cfg_scale}, expected {expected}")
    return float(cfg_scale)


def check_noise(
    noise: Sequence[ArrayLike], config: FlowARConfig, batch: int
) -> list[Float32[np.ndarray, "_ _ C"]]:
    """The conditional half of every scale's noise.

    Raises:
      InputError: other shapes.
    """
    parts = [as_array("noise", part, np.float32) for part in noise]
    wanted = [(side * side, config.channels) for side in config.scales]
    shapes = [part.shape for part in parts]
    rows = {shape[0] for shape in shapes if shape}
    if [shape[1:] for shape in shapes] != wanted or not rows <= {batch, 2 * batch}:
        raise InputError(
            f"noise has shapes {shapes}, expected one array per scale, [{batch} or {2 * batch}, "
            f"i^2, C] with (i^2, C) = {wanted}"
        )
    return [part[:batch] for part in parts]


def check_known(latents: ArrayLike | None, mask: ArrayLike | None, config: FlowARConfig) -> Known:
    """The latents to keep and where to sample anew.

    Raises:
      InputError: only one of them, other shapes or types, or a mask that is empty for some image.
    """
    if latents is None or mask is None:
        raise InputError("latents and mask belong together: give both, or none")
    latents, mask = as_array("latents", latents), as_array("the mask", mask)
    side, channels = config.latent_side, config.channels
    if latents.shape[1:] != (side, side, channels) or latents.dtype.kind != "f":
        raise InputError(
            f"latents are {latents.dtype} {latents.shape}, expected floating point numbers "
            f"[B, {side}, {side}, {channels}]"
        )
    check_mask(mask, (len(latents), side, side))
    return Known(latents.astype(np.float32), mask)


def check_mask(mask: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Raises InputError unless the mask is bool, of that shape, and of every image a part."""
    if mask.shape != shape or mask.dtype != bool:
        wanted = "{} masks of {} x {}".format(*shape)
        raise InputError(f"the mask is {mask.dtype} {mask.shape}, expected {wanted}, bool")
    if not mask.any(axis=(1, 2)).all():
        raise InputError("the mask is empty: it has to be true where the image is to be new")
