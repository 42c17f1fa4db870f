"""The error of what a caller gives to a model."""

import contextlib
from collections.abc import Generator

from detailflow_jax.runtime.errors import UserError


class InputError(UserError, ValueError):
    """Images, codes, labels or settings that a model cannot take; the text says what to give."""


@contextlib.contextmanager
def as_input_error(where: str = "") -> Generator[None]:
    """Within, a ValueError is about what the caller gave: for checks of the floors below alone."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where}{error}") from error
