"""The errors that a command prints in one line; all others keep their traceback."""

import contextlib
import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MOST_SEED = 2**32 - 1  # A larger one would mean the same as a smaller one.


def in_range(
    kind: str, least: float | None = None, most: float | None = None, above: float | None = None
) -> str:
    """Returns what an error expects: "a whole number from 0 to 8"."""
    if above is not None:
        return f"{kind} above {above}" + ("" if most is None else f", at most {most}")
    if least is None:
        return kind
    return f"{kind} of at least {least}" if most is None else f"{kind} from {least} to {most}"


class UserError(Exception):
    """An error whose text says what is wrong and what to do; commands print it and leave.

    Attributes:
      exit_code: of the command. 2: only another command line, configuration or file can help;
        1: the same command may succeed when it is started again.
      label: what the command prints before the text.
    """

    exit_code = 2
    label = "error"

    def report(self) -> int:
        """Prints the error to stderr and returns the exit code."""
        print(f"{self.label}: {self}", file=sys.stderr)
        return self.exit_code


class ConfigError(UserError, ValueError):
    """A configuration, command line or workdir that cannot be used."""


class NotFoundError(ConfigError, FileNotFoundError):
    """A file, folder or dataset that the configuration names and that is not there."""


class DataError(UserError, RuntimeError):
    """Data that cannot be read; the text says what stopped it."""


class ReadError(DataError):
    """Data that cannot be read now; the same run may succeed when it is started again."""

    exit_code = 1
    label = "failed"


class CheckpointError(UserError, RuntimeError):
    """Checkpoints that cannot be written or read; of published ones see `convert.errors`."""


class WriteError(CheckpointError):
    """A write that failed; the same run may succeed when it is started again."""

    exit_code = 1
    label = "failed"


class FileError(UserError, OSError):
    """A file that cannot be written; the same command may succeed when there is room for it."""

    exit_code = 1
    label = "failed"


class BucketError(FileError):
    """A bucket that does not answer; the same command may succeed when it is started again."""


class ProcessLost(UserError, RuntimeError):
    """Another process of the run left or died; the same command may succeed when started again."""

    exit_code = 1
    label = "failed"


class Diverged(UserError, RuntimeError):
    """The loss or the state is no longer finite; the text says at which step."""

    exit_code = 1
    label = "diverged"


def reported(command: Callable[..., int]) -> Callable[..., int]:
    """Returns a function that gives an exit code; a UserError of it becomes one line and a code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> int:
        try:
            return command(*args, **options)
        except UserError as error:
            return error.report()

    return wrapped


@contextlib.contextmanager
def raised_as(kind: Callable[[str], UserError], where: str = "") -> Iterator[None]:
    """Within, a ValueError becomes an error of the user: around a check of values alone.

    Args:
      kind: of the error.
      where: begins its text.
    """
    try:
        yield
    except ValueError as error:
        raise kind(f"{where}{error}") from error


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Returns the error for a name that is not in `known`, such as "generator size 'GPT-Q'"."""
    return ConfigError(f"unknown {what} {name!r}; {closest_names(name, known)}")


def closest_names(name: str, known: Iterable[str], most: int = 40) -> str:
    """Returns the end of an error text: the names closest to `name`, or all if none is close."""
    known = list(known)
    if near := near_names(name, known):
        return f"closest names: {', '.join(near)}"
    rest = " ..." if len(known) > most else ""
    return f"expected one of {', '.join(known[:most])}{rest}"


def near_names(name: str, known: Iterable[str], count: int = 4) -> list[str]:
    """Returns up to `count` names of `known` closest to `name`; "lr" is close to "optim.lr" too."""

    def closeness(option: str) -> float:
        last = option.rpartition(".")[2]
        return max(
            difflib.SequenceMatcher(None, name, option).ratio(),
            difflib.SequenceMatcher(None, name.rpartition(".")[2], last).ratio() - 0.05,
        )

    ranked = sorted(((closeness(option), option) for option in known), reverse=True)
    return [option for score, option in ranked[:count] if score >= 0.55]
