"""Runs that go on after their data have moved, with other worker processes and other folders."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import toy_images
import toy_task
from detailflow_jax import train
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.config import read_config
from detailflow_jax.runtime.errors import ConfigError, ReadError

STEPS = 12


def config_of(folder, **data):
    config = toy_images.get_config(str(folder))
    config.update({"total_steps": STEPS, "data": {"num_workers": 0} | data})
    return config


def stopped_after(steps: int, folder, workdir) -> None:
    """The first steps of a run, whose disk does not answer then."""
    config = config_of(folder)
    rows = toy_task.Stops(toy_images.rows(config), steps, TimeoutError())
    with pytest.raises(ReadError):
        train.train(config, workdir, toy_task.make_task(config), rows)


@pytest.fixture
def stopped(tmp_path):
    """(folder of the images, workdir) of a run of which five steps are done."""
    toy_images.make_folder(tmp_path / "images")
    stopped_after(5, tmp_path / "images", tmp_path / "run")
    return tmp_path / "images", tmp_path / "run"


def test_data_that_have_moved_go_on_with_the_same_bits(stopped, tmp_path):
    images, workdir = stopped
    toy_images.run(config_of(images), tmp_path / "undisturbed")
    moved = images.rename(tmp_path / "elsewhere")
    toy_images.run(config_of(moved, num_workers=1, prefetch=3), workdir)
    runs = [jax.tree.leaves(restore_params(run)) for run in (workdir, tmp_path / "undisturbed")]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "has moved to" in (workdir / "log.txt").read_text()
    assert read_config(workdir).data.source == f"folder:{moved}"


def test_other_data_of_the_same_names_are_refused(stopped, tmp_path):
    images, workdir = stopped
    for file in images.rglob("*.png"):
        smaller = tmp_path / "smaller" / file.relative_to(images)
        smaller.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((9, 9)).save(smaller)
    with pytest.raises(ConfigError, match=r"was started with other data: config\.data\.source is"):
        toy_images.run(config_of(tmp_path / "smaller"), workdir)


def test_frozen_weights_may_move_and_not_change(stopped, tmp_path):
    images, workdir = stopped

    def resume(seed: int):
        config = config_of(images)
        config.teacher = {"path": "elsewhere"}
        other = toy_task.get_config()
        other.seed = seed  # It makes the frozen matrix of the toy task.
        task = toy_task.make_task(config)
        frozen = toy_task.make_task(other).init(jax.random.key(seed)).frozen
        init = task.init
        task = dataclasses.replace(task, init=lambda key: init(key).replace(frozen=frozen))
        return train.train(config, workdir, task, toy_images.rows(config))

    with pytest.raises(ConfigError, match=r"other weights: config\.teacher\.path is absent there"):
        resume(seed=1)
    assert int(resume(seed=0).step) == STEPS
