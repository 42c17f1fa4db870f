"""The error that says why something cannot be scored."""


class EvaluationError(ValueError):
    """Images, a reference or weights that cannot be scored; the text says what to do."""
