"""Rotary position tables and their application to adjacent pairs.

Shapes: B batch, T positions, H heads, h head dimension, F = h/2 frequency pairs. A table holds
(cos, sin) in its last axis.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from detailflow_jax.ops import Array

Table = Float[np.ndarray, "T F 2"]


def frequencies(head_dim: int, theta: float = 10_000.0) -> Float[np.ndarray, " {head_dim//4}"]:
    """theta^(-4k/h) for k < h/4: float32, computed the way PyTorch computes them.

    Raises:
      ValueError: if the head dimension is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} must be a multiple of 4 for 2-D rotary positions")
    exponent = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    return np.float32(1.0) / np.float32(theta) ** exponent


def _table(first: Float[np.ndarray, "T f"], second: Float[np.ndarray, "T f"]) -> Table:
    """The table whose first half of the pairs turns by `first`, the second by `second`."""
    angles = np.concatenate([first, second], axis=1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def group_rotary_table(
    num_tokens: int, group_size: int, head_dim: int, theta: float = 10_000.0
) -> Table:
    """2-D rotary table over (group, place in group), with a row of zeros for the class token.

    The first half of the frequency pairs turns with the group, the second with the place, both by
    `frequencies`. The zero row (cos = sin = 0) makes the query and the key of the class position
    vanish, as in the published code.

    Returns:
      float32 [N + 1, h/2, 2]; position p >= 1 is token p - 1.
    """
    turns = frequencies(head_dim, theta)
    token = np.arange(num_tokens, dtype=np.float32)
    table = _table(np.outer(token // group_size, turns), np.outer(token % group_size, turns))
    return np.concatenate([np.zeros_like(table[:1]), table])


def grid_rotary_table(
    side: int, stretch: float, head_dim: int, theta: float = 10_000.0
) -> Float[np.ndarray, "{side**2} F 2"]:
    """2-D rotary table over a square grid whose coordinates are (0 .. side - 1) * stretch.

    Rows turn the first half of the frequency pairs and columns the second, both by `frequencies`.
    Stretching makes grids of several sizes cover the same area. Positions are row-major.
    """
    turns = frequencies(head_dim, theta)
    turn = np.outer(np.arange(side, dtype=np.float32) * np.float32(stretch), turns)
    return _table(np.repeat(turn, side, axis=0), np.tile(turn, (side, 1)))


def rotate(x: Float[Array, "B T H h"], table: Float[Array, "T F 2"]) -> Float[Array, "B T H h"]:
    """x with its adjacent pairs turned by the table, computed in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_by_product(
    x: Float[Array, "B T H h"], table: Float[Array, "T F 2"]
) -> Float[Array, "B T H h"]:
    """As `rotate`; faster on a TPU, where an array of pairs fills 2 of 128 lanes.

    Each number meets the other one of its pair by a product with zeros, ones and minus ones, which
    is exact.
    """
    cos, sin = (jnp.repeat(table[:, None, :, i], 2, axis=-1) for i in range(2))
    swap = jnp.asarray(np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]), x.dtype)
    exact = "highest" if x.dtype == jnp.float32 else None
    other = jnp.matmul(x, swap, precision=exact, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
