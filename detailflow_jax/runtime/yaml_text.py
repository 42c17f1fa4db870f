"""YAML as other programs write it, of which nothing is built but plain values."""

from typing import Any

import yaml


class _Plain(yaml.SafeLoader):
    """Reads tuples and namespaces of `yaml.dump` too; builds nothing that a file names."""


_PYTHON = "tag:yaml.org,2002:python/"
_Plain.add_constructor(
    f"{_PYTHON}tuple", lambda loader, node: loader.construct_sequence(node, True)
)
_Plain.add_multi_constructor(
    f"{_PYTHON}object:", lambda loader, _, node: loader.construct_mapping(node, True)
)


def parse_yaml(text: str) -> Any:
    """Returns what YAML text holds, with tuples and namespaces of `yaml.dump` as plain values.

    Raises:
        ValueError: no YAML, or it names other objects of Python; the text is one line.
    """
    try:
        return yaml.load(text, _Plain)
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, OverflowError) as error:
        # Its constructors raise almost any class on values that are not of their tag.
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
