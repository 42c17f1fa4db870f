"""The notebooks run from the first to the last cell on small trained models."""

import pathlib
import tarfile

import jupytext
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CASES = [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.full) for path in NOTEBOOKS[1:])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Digits models of three training steps each: tokenizer, generator, vae, flowar."""
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(ROOT / "tests" / "fixtures" / "old_runs" / "runs.tar.xz") as archive:
        archive.extractall(folder)
    return folder


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, runs, monkeypatch):
    monkeypatch.setenv("DEMO", str(runs))
    monkeypatch.setenv("DEMO_FLOWAR", str(runs))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(path)
    client = NotebookClient(notebook, kernel_name="python3", timeout=200)
    client.execute(cwd=str(path.parent))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
