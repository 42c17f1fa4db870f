"""Codes of a whole dataset: one record per image.

Shapes: K crops of one image; N tokens; the last axis of codes is (clean, input, label), the
triplet of self-correction.
"""

import dataclasses
import io
import os

import numpy as np
from jaxtyping import Float32

from detailflow_jax.data.shard_source import ShardSource
from detailflow_jax.data.shards import ShardLayout
from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError, NotFoundError, raised_as

CODEBOOK = "codebook.npy"
"""File beside the shards: the codebook of the tokenizer, float32 [V, d], not normalised."""

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

    @classmethod
    def read_codebook(cls, directory: str) -> Float32[np.ndarray, "V d"]:
        """The codebook of the tokenizer that made the codes.

        Raises:
          NotFoundError: there is none: the folder was written before it was kept.
          ConfigError: it is not that of these codes.
        """
        size = cls.read_manifest(directory)["codebook_size"]
        path = os.path.join(os.fspath(files.path(directory)), CODEBOOK)
        if not files.exists(path):
            raise NotFoundError(
                f"{path} is missing, which a flow head needs: run the same extraction again, it "
                "adds the file and leaves the codes as they are"
            )
        stream = io.BytesIO(files.read_bytes(path))
        with raised_as(ConfigError, f"{path} is no array: "):
            codebook = np.lib.format.read_array(stream, allow_pickle=False)
        rows = codebook.shape[0] if codebook.ndim == 2 else -1
        if rows != size or codebook.dtype != np.float32 or not np.isfinite(codebook).all():
            raise ConfigError(
                f"{path} is {codebook.dtype} {codebook.shape}, expected finite float32 [{size}, d]"
            )
        return codebook


def codebook_file(codebook: Float32[np.ndarray, "V d"]) -> bytes:
    """The content of `CODEBOOK`."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(codebook))
    return stream.getvalue()
