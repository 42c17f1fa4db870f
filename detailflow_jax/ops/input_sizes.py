"""Dynamic input resolution: the size and the number of the images of every training step.

A pure function of (seed, step), which both the data pipeline and the training step evaluate. It
uses NumPy alone, since worker processes that read images need it.
"""

import dataclasses
from typing import Any

import numpy as np

_STREAM = 1  # Separates these draws from the step's other ones, which are seeded by (seed, step).


@dataclasses.dataclass(frozen=True)
class InputSizes:
    """The input size and the number of images of each step.

    Attributes:
      usual: side in pixels of most batches (`config.data.image_size`).
      probability: of a batch of another size.
      sizes: the other sizes; one is drawn uniformly.
      batch_size: global batch of the usual size, and of smaller ones.
      multiple: batches of larger images hold a multiple of this many, reduced so that no batch has
        more pixels than a usual one (but never less than one `multiple`).
      seed: of the run.

    Raises:
      ValueError: if a field is out of range.
    """

    usual: int
    probability: float
    sizes: tuple[int, ...]
    batch_size: int
    multiple: int
    seed: int

    def __post_init__(self):
        field = "config.data.dynamic"
        if not 0 <= self.probability <= 1:
            raise ValueError(f"{field}.probability={self.probability} is not between 0 and 1")
        if not self.sizes or any(not isinstance(s, int) or s < 1 for s in self.sizes):
            raise ValueError(f"{field}.sizes={self.sizes}: expected one or more sides in pixels")
        if not 1 <= self.multiple <= self.batch_size:
            raise ValueError(
                f"{field}.multiple={self.multiple}: expected 1 to config.batch_size="
                f"{self.batch_size}, and a multiple of the devices that split a batch"
            )

    @property
    def possible(self) -> tuple[int, ...]:
        """Every size that a step can have, ascending."""
        return tuple(sorted({self.usual, *self.sizes}))

    def size(self, step: int) -> int:
        """The side in pixels of the images of a step."""
        rng = np.random.default_rng((self.seed, step, _STREAM))
        if rng.random() >= self.probability:
            return self.usual
        return self.sizes[rng.integers(len(self.sizes))]

    def images(self, size: int) -> int:
        """The global batch of images of a size."""
        if size <= self.usual:
            return self.batch_size
        fitting = self.batch_size * self.usual**2 // size**2
        return max(fitting // self.multiple, 1) * self.multiple


def input_sizes(data: Any, batch_size: int, seed: int) -> InputSizes | None:
    """The sizes that `config.data` asks for; None if all batches have its `image_size`.

    Raises:
      ValueError: if a field is out of range.
    """
    dynamic = data.get("dynamic")
    if not (dynamic and dynamic["probability"]):
        return None
    return InputSizes(
        usual=data["image_size"],
        probability=dynamic["probability"],
        sizes=tuple(dynamic["sizes"]),
        batch_size=batch_size,
        multiple=dynamic["multiple"],
        seed=seed,
    )
