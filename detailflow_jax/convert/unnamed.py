"""Tensors in a list, without names: an average in the order of the parameters of a model beside it.

So do torch_ema and diffusers' EMAModel (`shadow_params`) and loops with one list per decay
(`ema_params`) keep it. The model's state dict names its parameters in the same order, but it may
also hold buffers and frozen parts, which such a list leaves out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detailflow_jax.convert.pickled import are_sizes

_BUFFER = re.compile(
    r"(^|\.)(running_(mean|var)|num_batches_tracked|position_ids|\w*mask|inv_freq|freqs(_cis)?|"
    r"codebook_used|\w+_u|\w+_v)$"
)
_FROZEN = re.compile(r"(^|\.)(repa_model|teacher|discriminator|loss)\.")
RECIPE = (
    "In PyTorch, `ema.copy_to(model.parameters())` and `torch.save(model.state_dict(), ...)` give "
    "the average its names."
)


def names_of(tensors: Sequence[Any], model: Mapping[str, Any]) -> list[str] | None:
    """Returns the names of the tensors of a list, if their shapes are those of the model.

    Args:
      tensors: of the list, in its order.
      model: name -> tensor of a state dict, in its order.
    """
    shapes = [_shape(x) for x in tensors]
    return next((c for c in _choices(model) if [_shape(model[n]) for n in c] == shapes), None)


def misfit(tensors: Sequence[Any], model: Mapping[str, Any]) -> str:
    """Returns why `names_of` found none."""
    *_, names = _choices(model)
    for i, (x, name) in enumerate(zip(tensors, names, strict=False)):
        if _shape(x) != _shape(model[name]):
            return f"its tensor {i} is {_shape(x)}, where {name} is {_shape(model[name])}"
    return f"it has {len(tensors)}, the model {len(names)} parameters"


def is_large(tensors: Sequence[Any]) -> bool:
    """Returns whether these may be parameters of a network: a history holds scalars."""
    return any(len(_shape(x) or ()) > 1 for x in tensors)


def _choices(model: Mapping[str, Any]) -> list[list[str]]:
    """What a list may hold: everything; parameters; parameters that are trained."""
    parameters = [
        n for n, x in model.items() if _dtype(x).kind not in "biu" and not _BUFFER.search(n)
    ]
    return [[*model], parameters, [name for name in parameters if not _FROZEN.search(name)]]


def _dtype(x: Any) -> np.dtype:
    return x.dtype if hasattr(x, "dtype") else x.type.dtype


def _shape(x: Any) -> tuple[int, ...] | None:
    return tuple(x.shape) if are_sizes(x.shape) else None
