"""Image resizing as two small matrix products.

Interpolation along one axis is linear, so it is a fixed (out x in) matrix. The matrices are made
in float64 with NumPy, once per pair of sizes, and used as float32: friendly to every accelerator
and, as plain arrays, able to travel into a compiled step as data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _read_only(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)  # cached, so shared by every caller
    return matrix


@functools.cache
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Area averaging (adaptive average pooling): float32 [size_out, size_in]."""
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        start, stop = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return _read_only(matrix)


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Bicubic with a = -0.75, half-pixel centres, clamped edges, no antialiasing.

    The kernel of `torch.nn.functional.interpolate(mode="bicubic")`; `jax.image.resize` has another
    (a = -0.5). Returns float32 [size_out, size_in].
    """
    a = -0.75
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((size_out, size_in))
    for tap in (-1, 0, 1, 2):
        x = np.abs(centre - (base + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(matrix, (np.arange(size_out), np.clip(base + tap, 0, size_in - 1)), weight)
    return _read_only(matrix)


@functools.cache
def antialiased_bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Triangle filter, widened when shrinking; for position tables. float32 [size_out, size_in]."""
    scale = size_in / size_out
    width = max(scale, 1.0)
    centre = (np.arange(size_out)[:, None] + 0.5) * scale
    matrix = np.maximum(0.0, 1.0 - np.abs(np.arange(size_in) + 0.5 - centre) / width)
    return _read_only(matrix / matrix.sum(axis=1, keepdims=True))


@functools.cache
def degradation_matrix(image_size: int, low_size: int, decoded_size: int) -> np.ndarray:
    """Reduce to `low_size` by area, then enlarge to `decoded_size` by bicubic, as one matrix.

    The training target for a short token sequence, in the paper a progressively degraded image.
    At full resolution it is the identity. Returns float32 [decoded_size, image_size].
    """
    down = area_matrix(image_size, low_size).astype(np.float64)
    return _read_only(bicubic_matrix(low_size, decoded_size).astype(np.float64) @ down)


def apply_matrices(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Resize [..., H, W, C] with rows [h, H] and columns [w, W] to [..., h, w, C], in float32."""
    images = jnp.asarray(images, jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    images = jnp.einsum("hH,...HWC->...hWC", rows, images, precision=precision)
    return jnp.einsum("wW,...hWC->...hwC", columns, images, precision=precision)


def enlarge(images: jax.Array, size: int) -> jax.Array:
    """Square images [..., H, H, C] brought to `size` by bicubic interpolation, float32."""
    matrix = bicubic_matrix(images.shape[-2], size)
    return apply_matrices(images, matrix, matrix)


def resize_position_table(table: jax.Array, height: int, width: int) -> jax.Array:
    """A square table [side * side, D] resized to a patch grid: [height * width, D].

    Antialiased bilinear, as in SigLIP2-NaFlex; float32.
    """
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0]:
        raise ValueError(f"position table has {table.shape[0]} rows; expected a square number")
    if (height, width) == (side, side):
        return jnp.asarray(table, jnp.float32)
    grid = table.reshape(side, side, -1)
    rows = antialiased_bilinear_matrix(side, height)
    columns = antialiased_bilinear_matrix(side, width)
    return apply_matrices(grid, rows, columns).reshape(height * width, -1)
