"""The list of published weights: what is there, what is not, and what its messages say."""

import hashlib
import pathlib
import types

import pytest

from detailflow_jax.evaluate import networks
from detailflow_jax.runtime import weights
from detailflow_jax.runtime.weights import WEIGHTS, WeightsError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETAILFLOW_WEIGHTS", str(tmp_path))
    return tmp_path


def put(folder, name, content=b"weights"):
    path = folder / WEIGHTS[name].file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_everything_missing(folder, capsys):
    assert weights.main([]) == 1
    out = capsys.readouterr().out
    for name, one in WEIGHTS.items():
        assert f"MISSING    {folder / one.file}" in out and one.source in out, name
    assert "no weights needed: generator" in out
    for field in (
        "config.teacher.path",
        "config.losses.perceptual.weight=0",
        "config.losses.adversarial.weight=0",
    ):
        assert field in out
    assert f"missing or damaged: {', '.join(weights.wanted_by(list(weights.RECIPES)))}" in out


def test_recipes_without_weights_lack_nothing(folder, capsys):
    assert weights.main(["generator"]) == 0
    assert "everything is there" in capsys.readouterr().out


def test_what_is_there_has_a_checksum(folder, capsys):
    path = put(folder, "kl16", b"abc" * 1000)
    assert weights.main(["flowar"]) == 0
    out = capsys.readouterr().out
    assert f"there      {path}" in out and hashlib.sha256(b"abc" * 1000).hexdigest() in out
    assert f"give config.vae.path={path}" in out and "vgg16" not in out
    assert weights.main(["flowar", "--no_checksum"]) == 0
    assert "sha256" not in capsys.readouterr().out


def test_a_checksum_that_is_published_is_compared(folder, capsys):
    put(folder, "inception"), put(folder, "lpips"), put(folder, "vgg16")
    assert weights.main(["evaluate"]) == 1
    out = capsys.readouterr().out
    assert "expected to begin with 397923af" in out and "missing or damaged: vgg16\n" in out
    assert weights.main(["evaluate", "--no_checksum"]) == 0


def test_published_checksums_are_those_in_the_names():
    for one in WEIGHTS.values():
        assert one.checksum in one.file


def test_unknown_recipe(folder, capsys):
    with pytest.raises(SystemExit) as error:
        weights.main(["tokeniser"])
    assert error.value.code == 2 and "unknown recipe 'tokeniser'" in capsys.readouterr().err


def test_locate(folder, tmp_path):
    how = {"field": "config.x.path", "without": "config.loss.x=0"}
    with pytest.raises(WeightsError) as error:
        weights.locate("dino", **how)
    text = str(error.value)
    for part in (str(folder / WEIGHTS["dino"].file), WEIGHTS["dino"].source, *how.values()):
        assert part in text
    path = put(folder, "dino")
    assert weights.locate("dino", **how) == weights.locate("dino", path="", **how) == path
    elsewhere = tmp_path / "elsewhere.pth"
    with pytest.raises(WeightsError, match=r"elsewhere\.pth"):
        weights.locate("dino", path=elsewhere, **how)
    elsewhere.write_bytes(b"x")
    assert weights.locate("dino", path=elsewhere, **how) == elsewhere


def test_the_usual_place_without_the_variable(monkeypatch):
    monkeypatch.delenv("DETAILFLOW_WEIGHTS", raising=False)
    assert weights.folder() == pathlib.Path("~/.cache/detailflow_jax/weights").expanduser()


def test_evaluation_reads_the_usual_places(folder, monkeypatch):
    with pytest.raises(WeightsError, match=r"--inception.*--features pixels"):
        networks.load_extractor(None, 8)
    with pytest.raises(WeightsError, match=r"vgg16-397923af\.pth.*--lpips.*--without lpips"):
        networks.load_perceptual(None)
    put(folder, "vgg16")
    with pytest.raises(WeightsError, match=r"vgg\.pth.*--without lpips"):
        networks.load_perceptual(None)
    put(folder, "lpips")
    read = []

    def fake(name, *files):
        read.extend(files)
        return types.SimpleNamespace(params={})

    monkeypatch.setattr(networks.published, "read", fake)
    networks.load_perceptual(None)
    assert read == [weights.expected("vgg16"), weights.expected("lpips")]
    networks.load_perceptual([str(folder / "vgg.pth")])  # a whole LPIPS is one file
    assert read[2:] == [folder / "vgg.pth"]
