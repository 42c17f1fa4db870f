"""Square arrays that are filled in part, at the top left: one program for several image sizes.

The filled side is data. Without a part (None) each function is what its name says, of a whole
array.

Shapes: H x W pixels; S = H = W side of what has a part, s <= S side of the part; C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from detailflow_jax.ops import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """The filled part of an array.

    Attributes:
      index: of s in `sides`, int32 []; data.
      sides: every s that there may be, ascending; the last is S. Static.
    """

    index: Any
    sides: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def inside(self) -> Bool[Array, "S S 1"]:
        """True in the filled part."""
        inside = jnp.arange(self.sides[-1]) < pick(lambda side: side, 0, self)
        return (inside[:, None] & inside)[..., None]


def over(part: Part | None, factor: int) -> Part | None:
    """The part of an array whose side is smaller by a factor, rounded down."""
    sides = tuple(side // factor for side in part.sides) if part else ()
    return part and dataclasses.replace(part, sides=sides)


def pick(make: Callable[[int], Any], side: int, part: Part | None) -> Any:
    """`make(side)`; of a part, `make(s)`, with zeros behind its rows and columns.

    It is made on the host for every s that there may be, of which the program picks one.
    """
    if part is None:
        return make(side)
    made = [np.asarray(make(side)) for side in part.sides]
    shape = np.max([one.shape for one in made], axis=0)
    table = np.zeros((len(made), *shape), made[0].dtype)
    for i, one in enumerate(made):
        table[(i, *map(slice, one.shape))] = one
    return jnp.asarray(table)[part.index]


def zeroed(x: Float[Array, "*batch H W C"], part: Part | None) -> Float[Array, "*batch H W C"]:
    """x with zeros outside of the part."""
    return jnp.where(part.inside, x, 0) if part else x


def mean(
    x: Float[Array, "*batch H W C"],
    part: Part | None,
    axis: tuple[int, ...] | None = None,
    *,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Mean over the part, with whatever x holds outside; the axes are both sides at least."""
    found = jnp.mean(zeroed(x, part), axis, keepdims=keepdims)
    if part is None:
        return found
    return found * pick(lambda side: np.float32(part.sides[-1] ** 2 / side**2), 0, part)
