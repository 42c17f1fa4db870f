"""What every source of labelled images offers."""

import abc
from collections.abc import Sequence

import numpy as np


class Source(abc.ABC):
    """Random access to labelled images: `len(source)` and `source[i]`, 0 <= i < len.

    `source[i]` is {"image": uint8 [H, W, 3] RGB, "label": int}; it raises UnreadableImage for a
    record that cannot be decoded. `name` is for people; `fingerprint` changes whenever the data
    do, so that what was derived from other data is recognised.

    `source.read(i, reduce_to)` is the same with a Picture, which spares a crop two copies of the
    image; see `decode_picture` for `reduce_to`.
    """

    name: str
    class_names: Sequence[str]
    fingerprint: str

    @property
    def quick_fingerprint(self) -> str:
        """As `fingerprint`, for every start of a run: it may rely on a sample of a large source."""
        return self.fingerprint

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int, reduce_to: int | None = None) -> dict: ...

    def __getitem__(self, index: int) -> dict:
        example = self.read(index)
        return {**example, "image": np.asarray(example["image"].pixels)}
