"""The error of what a caller gives to a model."""

from detailflow_jax.runtime.errors import UserError


class InputError(UserError, ValueError):
    """Images, codes, labels or settings that a model cannot take; the text says what to give."""
