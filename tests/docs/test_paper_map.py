"""Every function and every test that docs/paper_map.md names exists."""

import ast
import functools
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| .* \| `([\w.]+):([\w.]+)` \| `([\w/]+\.py)::(\w+)` \|$",
    (ROOT / "docs" / "paper_map.md").read_text(),
    flags=re.MULTILINE,
)


@functools.cache
def names_of_tests(path: pathlib.Path) -> set[str]:
    """Names of the test functions of a file, of its classes too."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_is_read():
    lines = (ROOT / "docs" / "paper_map.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| topic")]
    assert len(rows) == len(ROWS) > 40


@pytest.mark.parametrize(
    ("module", "name", "path", "test"), ROWS, ids=[f"{m}:{n}" for m, n, *_ in ROWS]
)
def test_row_names_what_exists(module, name, path, test):
    found = importlib.import_module(f"detailflow_jax.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    assert test in names_of_tests(ROOT / path)
