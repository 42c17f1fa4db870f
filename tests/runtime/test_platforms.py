"""The platform of a command on machines with and without TPUs."""

import os
import types

import pytest

import detailflow_jax as df
from detailflow_jax.runtime import platforms


@pytest.fixture
def machine(monkeypatch):
    """A machine with libtpu and no device."""
    found: dict[str, list] = {"files": [], "plugins": [], "modules": ["libtpu"]}
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in platforms._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    fake_glob = types.SimpleNamespace(glob=lambda pattern: found["files"])
    monkeypatch.setattr(platforms, "glob", fake_glob)
    metadata = types.SimpleNamespace(entry_points=lambda group: found["plugins"])
    util = types.SimpleNamespace(find_spec=lambda name: name in found["modules"] or None)
    fakes = types.SimpleNamespace(metadata=metadata, util=util)
    monkeypatch.setattr(platforms, "importlib", fakes)
    yield found
    os.environ.pop("JAX_PLATFORMS", None)


def test_without_a_tpu_the_cpu_is_chosen_and_said_in_a_line(machine, capsys):
    platforms.choose(tell=True)
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert capsys.readouterr().err.count("\n") == 1


def test_python_code_chooses_too(monkeypatch):
    chosen = []
    monkeypatch.setattr(platforms, "choose", lambda: chosen.append(1))
    assert df.__getattr__("to_uint8") and chosen == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["/dev/accel0"]},  # a TPU VM
        {"plugins": ["xla_cuda13"]},
        {"modules": ["libtpu", "jax_plugins"]},
        {"modules": []},  # no libtpu that would complain
    ],
)
def test_elsewhere_the_choice_is_left_to_jax(machine, capsys, change):
    machine.update(change)
    platforms.choose(tell=True)
    assert "JAX_PLATFORMS" not in os.environ and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", *platforms._VARIABLES])
def test_variables_of_the_user_win(machine, monkeypatch, name):
    monkeypatch.setenv(name, "tpu")
    before = dict(os.environ)
    platforms.choose()
    assert dict(os.environ) == before
