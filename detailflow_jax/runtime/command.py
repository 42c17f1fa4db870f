"""The command lines of the package: their parsers, and the name under which one was started."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from detailflow_jax.runtime.errors import MOST_SEED, in_range

_PACKAGE = "detailflow_jax"


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of texts that have several, and tells the defaults that say something."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        nothing = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
        return text if nothing or "default" in text else f"{text} (default: %(default)s)"


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Returns the type of an option that takes whole numbers from `least` to `most`."""
    return _reader(int, "a whole number", least, most)


def number(
    least: float | None = None, most: float | None = None, *, above: float | None = None
) -> Callable[[str], float]:
    """Returns the type of an option that takes finite numbers, more than `above` where given."""
    return _reader(float, "a number", least, most, above)


def seed(text: str) -> int:
    """The type of an option that takes a seed."""
    return whole(0, MOST_SEED)(text)


def several(kind: Callable[[str], Any]) -> Callable[[str], list]:
    """Returns the type of an option that takes values separated by commas."""
    return lambda text: [kind(part) for part in text.split(",")]


def _reader(
    kind: Callable[[str], Any],
    name: str,
    least: float | None,
    most: float | None,
    above: float | None = None,
) -> Callable[[str], Any]:
    low, high = -math.inf if least is None else least, math.inf if most is None else most

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and low <= value <= high and (above is None or value > above):
            return value
        wanted = in_range(name, least, most, above)
        raise argparse.ArgumentTypeError(f"{text!r}: expected {wanted}")

    return read


def make_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Returns the parser of a command.

    Args:
      command: its name as a subcommand of `detailflow`, such as "train".
      description: above the options.
      epilog: below them; one of several lines keeps them.
    """
    return argparse.ArgumentParser(
        prog=program_name(command),
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def program_name(command: str) -> str:
    """Returns what the help shows as the program.

    Args:
      command: its name as a subcommand of `detailflow`, such as "train".

    Returns:
      "python -m detailflow_jax.train" if Python was started so, else "detailflow train".
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    if module.startswith(f"{_PACKAGE}.") and module != f"{_PACKAGE}.cli":
        return f"python -m {module}"
    return f"detailflow {command}"
