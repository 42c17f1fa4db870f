"""The recipes of CONTRIBUTING.md run as they stand there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = re.findall(
    r"^```(?:python|bash)\n# (\w+\.(?:py|sh))\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)
RECIPES = {"loss", "network", "dataset", "rule", "launcher"}


@pytest.mark.full
def test_every_recipe_passes(tmp_path):
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    tests = {path.stem for path in tmp_path.glob("test_*.py")}
    assert tests == {f"test_{recipe}_recipe" for recipe in RECIPES}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pyproject.toml", str(tmp_path)],
        # Small networks, whose time is the compiler's.
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
