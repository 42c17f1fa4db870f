"""The demos from end to end, with networks and runs too small for good pictures."""

import json

import numpy as np
import pytest

from detailflow_jax.demo import __main__ as detailflow
from detailflow_jax.demo import adversarial, flowar, photos, stages
from detailflow_jax.evaluate import digits
from detailflow_jax.inference import generate
from detailflow_jax.runtime.config import load_config, read_config, write_config


def test_grid_of_samples_has_a_column_per_class():
    marked = np.broadcast_to(stages.LABELS[:, None, None, None], (500, 2, 2, 3)).astype(np.uint8)
    grid = stages.samples_grid(marked)
    assert grid.images[:, 0, 0, 0].tolist() == [*range(10)] * stages.SHOWN_PER_CLASS
    assert grid.picture().shape[1] == 10 * (2 * 2 + 2) + 2


def test_one_of_each_is_in_order():
    labels = np.array([*range(9, -1, -1), 3])
    assert stages.one_of_each(labels, labels).tolist() == [*range(10)]


def test_a_stage_that_fails_is_timed_and_runs_again(tmp_path):
    with pytest.raises(ZeroDivisionError), stages.Stages(tmp_path).stage("sum"):
        _ = 1 / 0
    with stages.Stages(tmp_path).stage("sum"):
        pass
    stored = json.loads((tmp_path / "seconds.json").read_text())
    assert stored["finished"] == ["sum"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("demo", "spec", "first"),
    [
        (detailflow, "configs/tokenizer.py:mnist", "tokenizer"),
        (flowar, "configs/vae.py:mnist", "vae"),
        (photos, "configs/tokenizer.py:photos", "tokenizer"),
        (adversarial, "configs/tokenizer.py:digits", "off"),
    ],
)
def test_a_folder_is_continued_with_its_own_seed_alone(demo, spec, first, tmp_path, capsys):
    write_config(load_config(spec), tmp_path / first)  # Of seed 0, as a stopped demo leaves it.
    assert demo.main(["--out", str(tmp_path), "--seed", "1"]) == 2
    assert "  seed: 0 in the workdir, 1 now\n" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("source", "least"), [("digits", 0.98), ("mnist", 0.97)])
def test_judge_is_right_on_held_out_digits(source, least):
    images, labels = digits.load(f"{source}:test", 32)
    judge = digits.Judge(f"{source}:train")
    assert judge.accuracy(images, labels) > least
    assert judge.accuracy(images, (labels + 1) % 10) < 0.2


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("demo", [detailflow, flowar, photos])
def test_whole_demo(demo, tmp_path, monkeypatch, capsys):
    def short(path, overrides=()):
        return load_config(f"{path}:runlocal", [*overrides, "--config.tensorboard=False"])

    def sample(*args, seed, **options):
        assert seed == 1
        return sampled(*args, seed=seed, **options)

    sampled = generate.sample
    monkeypatch.setattr(generate, "sample", sample)
    monkeypatch.setattr(demo, "load_config", short)
    assert demo.main(["--out", str(tmp_path), "--seed", "1"]) == 0
    assert {read_config(path.parent).seed for path in tmp_path.glob("*/config.json")} == {1}
    figures = json.loads((tmp_path / "figures.json").read_text())
    first, picture = "Digits that it wrote", "samples.png"
    if demo is photos:
        first, picture = "From fewer and more tokens", "patches.png"
        assert list(figures["psnr_by_tokens"]) == ["4", "8", "12", "16", "20", "24", "28", "32"]
    else:
        assert {"accuracy", "reconstructed_accuracy", "classifier_accuracy"} <= set(figures)
        assert figures["classifier_accuracy"] > 0.97
    page = (tmp_path / "report.html").read_text()
    for heading in (first, "Figures", "Seconds", stages.NEXT):
        assert f"<h2>{heading}</h2>" in page
    assert page.index("Figures</h2>") < page.index("Seconds</h2>") < page.index(stages.NEXT)
    assert (tmp_path / picture).exists()
    assert "report:" in capsys.readouterr().out
