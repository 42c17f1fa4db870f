"""What a command tells its user in one line; every other exception keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error whose text says what is wrong and what to do; commands print it and leave.

    Attributes:
      exit_code: of the command. 2: only another command line, configuration or file can help;
        1: the same command may succeed when it is started again.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration, command line or workdir that cannot be used."""


def near_names(name: str, known: Iterable[str], count: int = 4) -> list[str]:
    """The names in `known` nearest to `name`; "lr" comes near to "optim.lr" too."""

    def closeness(option: str) -> float:
        last = option.rpartition(".")[2]
        return max(
            difflib.SequenceMatcher(None, name, option).ratio(),
            difflib.SequenceMatcher(None, name.rpartition(".")[2], last).ratio() - 0.05,
        )

    ranked = sorted(((closeness(option), option) for option in known), reverse=True)
    return [option for score, option in ranked[:count] if score >= 0.55]
