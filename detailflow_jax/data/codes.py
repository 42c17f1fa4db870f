"""Codes of a whole dataset: one record per image.

Shapes: K crops of one image; N tokens; the last axis of codes is (clean, input, label), the
triplet of self-correction.
"""

import dataclasses

import numpy as np

from detailflow_jax.data.shard_source import ShardSource
from detailflow_jax.data.shards import ShardLayout

_NEEDED = {"source", "tokenizer", "class_names", "num_classes", "image_size"}
_NEEDED |= {"group_size", "causal_num", "crops", "seed"}


@dataclasses.dataclass(frozen=True)
class CodeLayout(ShardLayout):
    """Records of integer codes [K, N, 3]."""

    num_crops: int  # K
    num_tokens: int  # N
    codebook_size: int

    what = field = "codes"
    needed = frozenset(_NEEDED)
    accepts = np.integer

    @property
    def value_dtype(self) -> np.dtype:
        """Codes [K, N, 3], in 2 bytes where they fit."""
        code = "<u2" if self.codebook_size <= 65536 else "<i4"
        return np.dtype((code, (self.num_crops, self.num_tokens, 3)))

    def check(self, index: int, value: np.ndarray) -> None:
        if value.min() < 0 or value.max() >= self.codebook_size:
            raise ValueError(
                f"codes of {index} range over [{value.min()}, {value.max()}], "
                f"outside of [0, {self.codebook_size})"
            )


class CodeSource(ShardSource):
    """Random access to a finished folder of codes; `source[i]` has "codes", int32 [K, N, 3]."""

    layout_class, dtype = CodeLayout, np.int32
