"""Softmax attention, by plain operations or by a fused kernel that keeps the scores on the chip.

    plain    everywhere, with everything; writes the scores of all heads to memory, in float32
    splash   TPU; no dropout, no prefix
    cudnn    NVIDIA GPU, in half precision; no dropout, no prefix

Shapes: B batch, T tokens, S tokens that keys and values come from (mostly T), P prefix tokens, H
heads, K key/value heads, h head dimension. Query head i reads key/value head i // (H/K).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from detailflow_jax.ops import Array

Query = Float[Array, "B T H h"]
KeyOrValue = Float[Array, "B S K h"]
Prefix = tuple[Float[Array, "B P K h"], Float[Array, "B P K h"]]

Shaped = Array | jax.ShapeDtypeStruct

IMPLEMENTATIONS = ("auto", "plain", "splash", "cudnn")
# Up to 256 tokens the TPU's compiler keeps plain scores on the chip; it was seen to write 341.
_SPLASH_FROM = 320
_TILE = 128  # Splash reads keys and queries in multiples of it.
_LARGEST_BLOCK = 640  # Several float32 arrays [block, block] lie in the core's own memory.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class StaticMask:
    """A mask that is known when a program is traced, and the same for every sample and head.

    As part of a program's structure it stays known inside of scans and rematerialisation.

    Attributes:
      allowed: True where attention is allowed, [T, P + S].
    """

    allowed: Bool[np.ndarray, "T S"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticMask) and np.array_equal(self.allowed, other.allowed)

    def __hash__(self) -> int:
        return hash((self.allowed.shape, self.allowed.tobytes()))


Mask = Bool[Array, "..."] | StaticMask
"""True where attention is allowed; an array is broadcastable to [B, 1, T, P + S]."""


def static(mask: Mask | None) -> Mask | None:
    """The mask, as `StaticMask` where it is known and the same for every sample."""
    if isinstance(mask, np.ndarray) and mask.size == math.prod(mask.shape[-2:]):
        return StaticMask(mask.reshape(mask.shape[-2:]))
    return mask


def plain(
    query: Query,
    key: KeyOrValue,
    value: KeyOrValue,
    *,
    prefix: Prefix | None = None,
    mask: Mask | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> Query:
    """Attention over the keys [prefix, own], without concatenating the two.

    Args:
      query: queries.
      key: own keys.
      value: own values.
      prefix: keys and values that come before the own ones: a cache, or another stream.
      mask: see `Mask`.
      drop: applied to the attention weights, such as dropout.

    Returns:
      [B, T, H, h] in the dtype of `value`; scores and softmax are float32.
    """
    batch, length, heads, head_dim = query.shape
    query = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    parts = [(key, value)] if prefix is None else [prefix, (key, value)]

    def score(part: Array) -> jax.Array:
        return jnp.einsum("btkrh,bskh->bkrts", query, part, preferred_element_type=jnp.float32)

    scores = jnp.concatenate([score(k) for k, _ in parts], axis=-1) * head_dim**-0.5
    if mask is not None:
        mask = mask.allowed if isinstance(mask, StaticMask) else mask
        mask = jnp.expand_dims(mask, 2) if mask.ndim == 4 else mask
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(value.dtype)
    edge = weights.shape[-1] - key.shape[1]
    split = [weights] if prefix is None else [weights[..., :edge], weights[..., edge:]]
    read = [jnp.einsum("bkrts,bskh->btkrh", w, v) for w, (_, v) in zip(split, parts, strict=True)]
    return functools.reduce(jnp.add, read).reshape(batch, length, heads, head_dim)


def choose(
    asked: str, platform: str, query: Shaped, key: Shaped, mask: Mask | None, *, bare: bool
) -> str:
    """The implementation for these arrays: "plain", "splash" or "cudnn".

    A fused kernel is used if it can compute this attention. "auto" uses one only in half
    precision, and only where measurements showed less memory traffic (docs/tpu_pods.md).

    Args:
      asked: one of `IMPLEMENTATIONS`.
      platform: "tpu", "gpu" or another.
      query: queries, [B, T, H, h].
      key: own keys, [B, S, K, h].
      mask: see `Mask`.
      bare: there is neither dropout nor a prefix.

    Raises:
      ValueError: an unknown implementation, or one that this platform does not have.
    """
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"attention={asked!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    own = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "plain")
    if asked not in ("auto", "plain", own):
        raise ValueError(f"attention={asked!r} is not for {platform!r}: expected auto or {own}")
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    same_length = query.shape[1] == key.shape[1]
    if asked == "plain" or own == "plain" or not (bare and same_length):
        return "plain"
    if own == "cudnn":
        return "cudnn" if half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 else "plain"
    if not (mask is None or isinstance(mask, StaticMask) or _of_keys(mask)):
        return "plain"
    return "splash" if asked == "splash" or (half and query.shape[1] >= _SPLASH_FROM) else "plain"


def _of_keys(mask: Array) -> bool:
    """Whether an array of a mask hides keys only, the same for all queries."""
    return mask.ndim == 4 and mask.shape[1:3] == (1, 1)


# ------------------------------------------------------------------------------------------- TPU


def splash(
    query: Query,
    key: KeyOrValue,
    value: KeyOrValue,
    mask: Mask | None = None,
    *,
    interpret: bool = False,
) -> Query:
    """What `plain` returns, by the TPU's kernel; lengths are padded to multiples of 128.

    The queries are scaled before the product, which rounds them unless h is a power of 4.

    Args:
      query: queries, as many as keys.
      key: own keys.
      value: own values.
      mask: a `StaticMask`, or an array [B or 1, 1, 1, S] of the keys that are shown.
      interpret: compute by plain operations, on any platform.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    batch, length, heads, head_dim = query.shape
    padded = -(-length // _TILE) * _TILE
    allowed = np.zeros((padded, padded), bool)
    allowed[:length, :length] = mask.allowed if isinstance(mask, StaticMask) else True
    allowed[length:, 0] = True  # Rows that are cut off; a softmax over nothing is no number.
    block = _block(padded)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    kernel = kernels.make_splash_mha(
        np.broadcast_to(allowed, (heads, padded, padded)),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    query = (query * jnp.float32(head_dim**-0.5)).astype(query.dtype)
    arrays = [_padded(x.swapaxes(1, 2), padded, 2) for x in (query, key, value)]  # [B, H, T, h]
    if mask is None or isinstance(mask, StaticMask):
        out = jax.vmap(kernel)(*arrays)
    else:  # Every query is of segment 1, as are the keys that are shown.
        shown = jnp.broadcast_to(mask[:, 0, 0], (batch, length)).astype(jnp.int32)
        shown = _padded(shown, padded, 1)
        out = jax.vmap(kernel)(*arrays, kernels.SegmentIds(jnp.ones_like(shown), shown))
    return jnp.swapaxes(out[:, :, :length], 1, 2).astype(value.dtype)


def _block(length: int) -> int:
    """The largest block that divides a padded length."""
    tiles = length // _TILE
    sizes = [n * _TILE for n in range(1, tiles + 1) if tiles % n == 0]
    return max(size for size in sizes if size <= _LARGEST_BLOCK)


def _padded(x: Array, length: int, axis: int) -> jax.Array:
    pads = [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, pads)


# ------------------------------------------------------------------------------------------- GPU


def cudnn(query: Query, key: KeyOrValue, value: KeyOrValue, mask: Mask | None = None) -> Query:
    """What `plain` returns, by cuDNN's kernel, which wants even lengths.

    Args:
      query: queries, as many as keys.
      key: own keys.
      value: own values.
      mask: see `Mask`.
    """
    length = query.shape[1]
    padded = length + length % 2
    arrays = [_padded(x, padded, 1) for x in (query, key, value)]
    if isinstance(mask, StaticMask):
        mask = mask.allowed[None, None]
    lengths = None
    if mask is not None:
        mask = _padded(jnp.broadcast_to(mask, (*mask.shape[:2], length, length)), padded, 3)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padded - length), (0, 0)), mode="edge")
    elif padded > length:
        lengths = jnp.full((len(query),), length, jnp.int32)
    out = jax.nn.dot_product_attention(
        *arrays,
        mask=mask,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :length].astype(value.dtype)
