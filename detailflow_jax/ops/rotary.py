"""Rotary position tables and their application to adjacent pairs."""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    """theta^(-4k/head_dim), k < head_dim/4: float32, made as PyTorch makes them.

    Raises:
      ValueError: a head dimension that is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} must be a multiple of 4 for 2-D rotary positions")
    exponent = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    return np.float32(1.0) / np.float32(theta) ** exponent


def group_rotary_table(
    num_tokens: int, group_size: int, head_dim: int, theta: float = 10_000.0
) -> np.ndarray:
    """2-D rotary over (group, place in group), with an all-zero first row for the class token.

    The first half of the frequency pairs turns with the group, the second with the place; the
    frequencies theta^(-4k/head_dim), k < head_dim/4, are the same for both. The zero row
    (cos = sin = 0) makes the class position's query and key vanish, as in the published code.

    Returns:
      float32 [N + 1, head_dim/2, 2] holding (cos, sin); position p >= 1 sits in cell p - 1.
    """
    turns = frequencies(head_dim, theta)
    cell = np.arange(num_tokens, dtype=np.float32)
    angles = [np.outer(cell // group_size, turns), np.outer(cell % group_size, turns)]
    angles = np.concatenate(angles, axis=1)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.concatenate([np.zeros((1, *table.shape[1:])), table]).astype(np.float32)


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Turn adjacent pairs of [B, T, H, head_dim] by table [T, head_dim/2, 2], in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def grid_rotary_table(
    side: int, stretch: float, head_dim: int, theta: float = 10_000.0
) -> np.ndarray:
    """2-D rotary over a square grid whose coordinates are (0 .. side - 1) * stretch.

    Rows turn the first half of the frequency pairs and columns the second, both with
    theta^(-4j/head_dim), j < head_dim/4. Stretching makes grids of several sizes cover one area.

    Returns:
      float32 [side^2, head_dim/2, 2] holding (cos, sin), row-major positions.
    """
    turns = frequencies(head_dim, theta)
    turn = np.outer(np.arange(side, dtype=np.float32) * np.float32(stretch), turns)
    rows, columns = np.repeat(turn, side, axis=0), np.tile(turn, (side, 1))
    angles = np.concatenate([rows, columns], axis=1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
