"""What models take, checked before anything is compiled.

Shapes: B images or samples, H x W pixels, n tokens, C latent channels, i side of a scale.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from detailflow_jax.inference.errors import InputError
from detailflow_jax.models.flow_sampler import Known
from detailflow_jax.models.flowar import FlowARConfig
from detailflow_jax.ops import Array
from detailflow_jax.ops.objectives import OBJECTIVES

_RANGE = 8.0  # of images of floats, beyond which they are no images in [-1, 1]
ArrayLike = Array | Sequence
"""What methods of models take: arrays, or nested sequences of numbers."""


def check_images(images: np.ndarray, channels: int, stride: int = 1) -> None:
    """Raises InputError unless images are [B, H, W, channels] with sides that stride divides.

    Floats have to be about [-1, 1]: decoded images leave this range by a half, others by far more.
    """
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


def check_flow_settings(
    cfg_scale: float, low: float, high: float, solver: str, objective: str
) -> None:
    """Raises InputError unless guidance is at least 1, 0 <= low <= high <= 1, the solver fits."""
    check_guidance(cfg_scale)
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


def check_guidance(cfg_scale: float) -> None:
    """Raises InputError unless the guidance scale is at least 1."""
    if not cfg_scale >= 1.0:
        raise InputError(f"cfg_scale={cfg_scale}, expected >= 1 (1 means no guidance)")


def check_noise(
    noise: Sequence[ArrayLike], config: FlowARConfig, batch: int
) -> list[Float32[np.ndarray, "_ _ C"]]:
    """The conditional half of every scale's noise.

    Raises:
      InputError: other shapes.
    """
    parts = [np.asarray(part, np.float32) for part in noise]
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
    latents, mask = np.asarray(latents), np.asarray(mask)
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
