"""The one error that reading and writing published checkpoints raises."""

from collections.abc import Collection

from detailflow_jax.runtime import errors


class CheckpointError(errors.CheckpointError, ValueError):
    """A checkpoint that cannot be read or written as asked.

    Args:
        found: where and what is wrong, beginning with the file, folder or tensor it is about.
        expected: what would have been right.
        remedy: a whole sentence, what to do about it.
    """

    def __init__(self, found: str, *, expected: str = "", remedy: str = ""):
        text = f"{found}; expected {expected}" if expected else found
        super().__init__(f"{text}. {remedy}" if remedy else text)


def some(names: Collection[str], most: int = 5) -> str:
    """Returns the first names for a message: "a, b, ..."."""
    return ", ".join([*names][:most]) + (", ..." if len(names) > most else "")
