"""The scales of FlowAR: a latent grid seen coarse to fine (the paper's scale design).

Shapes: B batch, S side of the latent grid, K scales of sides i_0 < ... < i_{K-1} = S, T = sum of
i_k^2 positions, C channels. Positions of a scale are row-major; the scales follow one another.
"""

import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from detailflow_jax.ops import Array, interpolation, rotary


def check_scales(scales: Sequence) -> None:
    """Raises ValueError unless the sides increase and start at 1 or more."""
    whole = all(isinstance(side, int | np.integer) and side >= 1 for side in scales)
    increasing = all(a < b for a, b in itertools.pairwise(scales))
    if not scales or not whole or not increasing:
        raise ValueError(
            f"scales={tuple(scales)} is no scale schedule; expected increasing sides, each at "
            "least 1, such as (1, 2, 4, 8, 16), the last one the side of the latent"
        )


def offsets(scales: Sequence[int]) -> tuple[int, ...]:
    """First position of every scale, then T: K + 1 numbers."""
    return (0, *np.cumsum([side * side for side in scales]).tolist())


def scale_index(scales: Sequence[int]) -> Int[np.ndarray, " T"]:
    """The scale that each position belongs to, int32."""
    return np.repeat(np.arange(len(scales), dtype=np.int32), [side * side for side in scales])


def scale_mask(scales: Sequence[int]) -> Bool[np.ndarray, "T T"]:
    """The attention mask: every position sees its own scale and all earlier ones."""
    index = scale_index(scales)
    return index[:, None] >= index[None, :]


def rotary_table(scales: Sequence[int], head_dim: int) -> Float[np.ndarray, "T {head_dim//2} 2"]:
    """Rotary table of all positions, each scale stretched over the area of the finest one."""
    tables = [rotary.grid_rotary_table(side, scales[-1] / side, head_dim) for side in scales]
    return np.concatenate(tables)


@functools.cache
def _next_matrix(finest: int, side: int, next_side: int) -> np.ndarray:
    """Matrix that enlarges to the finest grid by bicubic, then reduces to the next by area."""
    up = interpolation.bicubic_matrix(side, finest).astype(np.float64)
    down = interpolation.area_matrix(finest, next_side).astype(np.float64)
    return interpolation.read_only(down @ up)


def reduce_to(latents: Float[Array, "B S S C"], side: int) -> Float[Array, "B {side**2} C"]:
    """The positions of one scale: the latents' area average, in float32."""
    matrix = interpolation.area_matrix(latents.shape[1], side)
    reduced = interpolation.apply_matrices(latents, matrix, matrix)  # [B, side, side, C]
    return reduced.reshape(len(latents), side * side, -1)


def reduce_mask(mask: Bool[Array, "B H W"], side: int) -> Bool[Array, "B {side**2} 1"]:
    """The positions of one scale of which any part is in the mask."""
    share = reduce_to(mask[..., None].astype(jnp.float32), side)
    return share > 0


def next_input(
    positions: Float[Array, "B {side**2} C"], side: int, next_side: int, finest: int
) -> Float[Array, "B {next_side**2} C"]:
    """What the transformer reads for the next scale, from a finished scale; float32.

    Args:
      positions: of the finished scale.
      side: its side.
      next_side: the next scale's side.
      finest: S.
    """
    grid = positions.reshape(len(positions), side, side, -1)
    matrix = _next_matrix(finest, side, next_side)
    out = interpolation.apply_matrices(grid, matrix, matrix)  # [B, next_side, next_side, C]
    return out.reshape(len(positions), next_side * next_side, -1)


def pyramid(
    latents: Float[Array, "..."], scales: Sequence[int]
) -> tuple[Float[Array, "B T C"], Float[Array, "B T_later C"]]:
    """Targets and inputs of all scales.

    Args:
      latents: [B, S, S, C], S being the last scale.
      scales: K sides.

    Returns:
      targets: float32 [B, T, C], the latents at every scale.
      inputs: float32 [B, T - i_0^2, C], what the transformer reads for scales 1 .. K - 1.

    Raises:
      ValueError: if the latents have another shape.
    """
    if latents.ndim != 4 or latents.shape[1:3] != (scales[-1], scales[-1]):
        raise ValueError(
            f"latents have shape {latents.shape}, expected [B, {scales[-1]}, {scales[-1]}, C]: "
            f"the last of the scales {tuple(scales)} is the side of the latent"
        )
    return sequence([reduce_to(latents, side) for side in scales], scales)


def sequence(
    levels: Sequence[Float[Array, "B _ C"]], scales: Sequence[int]
) -> tuple[Float[Array, "B T C"], Float[Array, "B T_later C"]]:
    """Targets and inputs, as of `pyramid`, from the positions [B, i^2, C] of each scale."""
    inputs = [
        next_input(level, side, after, scales[-1])
        for level, (side, after) in zip(levels, itertools.pairwise(scales), strict=False)
    ]
    empty = jnp.zeros((len(levels[0]), 0, levels[0].shape[-1]), jnp.float32)
    return jnp.concatenate(levels, axis=1), jnp.concatenate([empty, *inputs], axis=1)
