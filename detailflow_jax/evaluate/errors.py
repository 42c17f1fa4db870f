"""The error that says why something cannot be scored."""

from detailflow_jax.runtime.errors import UserError


class EvaluationError(UserError, ValueError):
    """Images, a reference or weights that cannot be scored; the text says what to do."""
