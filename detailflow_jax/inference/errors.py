"""The error of what a caller gives to a model."""

import contextlib

from detailflow_jax.runtime.errors import UserError, raised_as


class InputError(UserError, ValueError):
    """Images, codes, labels or settings that a model cannot take; the text says what to give."""


class InputTypeError(InputError, TypeError):
    """Numbers of another type."""


def as_input_error(where: str = "") -> contextlib.AbstractContextManager[None]:
    """Within, a ValueError is about what the caller gave: for checks of the floors below alone."""
    return raised_as(InputError, where)
