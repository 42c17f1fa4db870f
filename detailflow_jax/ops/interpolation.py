"""Image resizing as two small matrix products.

Interpolation along one axis is linear, so it is a fixed matrix [size_out, size_in]. The matrices
are computed in float64 with NumPy, once per pair of sizes, and used as float32. This suits every
accelerator, and as plain arrays they can enter a compiled step as data.

Shapes: H x W pixels before, h x w pixels after, C channels, D width of a position table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from detailflow_jax.ops import Array, padded


def read_only(matrix: np.ndarray) -> np.ndarray:
    """The matrix as float32 that cannot be written to, since a cache shares it."""
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


@functools.cache
def area_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "{size_out} {size_in}"]:
    """Matrix of area averaging (adaptive average pooling)."""
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        start, stop = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return read_only(matrix)


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "{size_out} {size_in}"]:
    """Matrix of bicubic interpolation: a = -0.75, half-pixel centres, clamped edges, no antialias.

    This is the kernel of `torch.nn.functional.interpolate(mode="bicubic")`; `jax.image.resize` uses
    a = -0.5.
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
    return read_only(matrix)


@functools.cache
def antialiased_bilinear_matrix(
    size_in: int, size_out: int
) -> Float[np.ndarray, "{size_out} {size_in}"]:
    """Matrix of a triangle filter that widens when it shrinks the image; for position tables."""
    scale = size_in / size_out
    width = max(scale, 1.0)
    centre = (np.arange(size_out)[:, None] + 0.5) * scale
    matrix = np.maximum(0.0, 1.0 - np.abs(np.arange(size_in) + 0.5 - centre) / width)
    return read_only(matrix / matrix.sum(axis=1, keepdims=True))


@functools.cache
def degradation_matrix(
    image_size: int, low_size: int, decoded_size: int
) -> Float[np.ndarray, "{decoded_size} {image_size}"]:
    """Matrix that reduces to `low_size` by area, then enlarges to `decoded_size` by bicubic.

    It gives the training target of a short token sequence (the paper's progressively degraded
    image). At full resolution it is the identity.
    """
    down = area_matrix(image_size, low_size).astype(np.float64)
    return read_only(bicubic_matrix(low_size, decoded_size).astype(np.float64) @ down)


def apply_matrices(
    images: Shaped[Array, "*batch H W C"], rows: Float[Array, "h H"], columns: Float[Array, "w W"]
) -> Float[Array, "*batch h w C"]:
    """Images resized by a matrix for the rows and one for the columns, in float32."""
    resized = jnp.asarray(images, jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    resized = jnp.einsum("hH,...HWC->...hWC", rows, resized, precision=precision)
    return jnp.einsum("wW,...hWC->...hwC", columns, resized, precision=precision)


def enlarge(
    images: Shaped[Array, "*batch H H C"], size: int
) -> Float[Array, "*batch {size} {size} C"]:
    """Square images brought to `size` by bicubic interpolation, in float32."""
    matrix = bicubic_matrix(images.shape[-2], size)
    return apply_matrices(images, matrix, matrix)


def resize_position_table(
    table: Float[Array, "rows D"], height: int, width: int, part: padded.Part | None = None
) -> Float[Array, "{height*width} D"]:
    """A square position table [side * side, D] resized to a grid of height x width patches.

    Antialiased bilinear, as in SigLIP2-NaFlex; float32. A `part` of the grid is what is filled, and
    the rest is zero.

    Raises:
      ValueError: if the number of rows is not a square.
    """
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0]:
        raise ValueError(f"position table has {table.shape[0]} rows; expected a square number")
    if part is None and (height, width) == (side, side):
        return jnp.asarray(table, jnp.float32)
    grid = table.reshape(side, side, -1)
    rows, columns = (
        padded.pick(lambda n: antialiased_bilinear_matrix(side, n), size, part)
        for size in (height, width)
    )
    return apply_matrices(grid, rows, columns).reshape(height * width, -1)
