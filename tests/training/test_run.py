"""The training loop on a small task: what it writes, what stops it, and how exactly it resumes."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import toy_task
from detailflow_jax import train
from detailflow_jax.runtime.checkpoint import Checkpoints, restore_params
from detailflow_jax.runtime.config import read_config, write_config
from detailflow_jax.runtime.errors import ConfigError, DataError, Diverged, UserError
from detailflow_jax.runtime.feed import Feed
from detailflow_jax.train import UNUSABLE


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, config, final state, variants traced, names of compiled functions) of a run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config, traced, compiled = toy_task.config_of(figures_every=8), [], []

    def listen(event, duration, **what):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(what.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    task = toy_task.make_task(config, traced)
    state = train.train(config, workdir, task, toy_task.make_iterator(config))
    return workdir, config, state, traced, compiled


def test_run_leaves_its_records(finished):
    workdir, _, state, _, _ = finished
    assert int(state.step) == 20
    lines = toy_task.metrics_of(workdir)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # Steps 1, 3 and 5 have variant 0; the mean of all is over those of both.
    total = 3 * lines[0]["variant_0"] + 2 * lines[0]["variant_1"]
    assert lines[0]["loss"] == pytest.approx(total / 5)
    assert lines[-1]["skipped"] >= 1  # Record 7 counts as unreadable.
    assert sorted(p.name for p in (workdir / "figures").iterdir()) == [
        f"inputs_{step:06d}.png" for step in (8, 16, 20)
    ]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["18", "20"]
    log = (workdir / "log.txt").read_text()
    assert all(text in log for text in ("1,608 parameters", "up/kernel", "first step", "step 5/20"))
    toy_task.assert_same_bits(restore_params(workdir), jax.device_get(state.ema))


def test_one_compilation_a_variant(finished):
    _, _, _, traced, compiled = finished
    assert sorted(traced) == [0, 1]
    assert sum("train_step" in name for name in compiled) == 2


def test_finished_run_started_again_says_so(finished, capfd):
    workdir, config, state, _, _ = finished
    before = toy_task.metrics_of(workdir)
    again = train.train(config, workdir, toy_task.make_task(config), toy_task.make_iterator(config))
    toy_task.assert_same_bits(again, state)
    assert toy_task.metrics_of(workdir) == before
    assert "finished" in capfd.readouterr().err


def test_a_finished_run_can_be_made_longer(finished, tmp_path):
    workdir, config, _, _, _ = finished
    shutil.copytree(workdir, tmp_path / "longer")
    clock = json.loads((workdir / "clock.json").read_text())
    clock["seconds"]["restart"] = 5000.0
    (tmp_path / "longer" / "clock.json").write_text(json.dumps(clock))
    longer = toy_task.config_of(**config.to_dict())
    longer.total_steps += 3
    state = toy_task.run(longer, tmp_path / "longer")
    # Adam and the average go on: neither starts anew, nor stands still.
    assert int(state.opt_state[0].count) == config.total_steps + 3
    before, after = jax.tree.leaves(restore_params(workdir)), jax.tree.leaves(state.ema)
    pairs = zip(before, after, jax.tree.leaves(state.params), strict=True)
    shares = [np.abs(y - x).max() / np.abs(z - x).max() for x, y, z in pairs]
    assert all(0 < share < 0.6 for share in shares)  # 0.27 of the way, were the parameters still.
    lines = toy_task.metrics_of(tmp_path / "longer")
    assert lines[: len(toy_task.metrics_of(workdir))] == toy_task.metrics_of(workdir)
    assert lines[-1]["step"] == config.total_steps + 3
    assert read_config(tmp_path / "longer").total_steps == config.total_steps + 3
    # The last line tells the seconds that its shares are of, those before the restart included.
    log = (tmp_path / "longer" / "log.txt").read_text()
    assert re.search(r"finished 23 steps in 50\d\d s: .*restart (100|99)%", log)


def test_a_start_that_fails_leaves_no_configuration_behind(tmp_path):
    config = toy_task.config_of(total_steps=2)
    task = toy_task.make_task(config)
    broken = dataclasses.replace(task, train_step=lambda *args, variant: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(config, tmp_path, broken, toy_task.make_iterator(config))
    assert not (tmp_path / "config.json").exists()
    config.optim.lr = 0.5  # The corrected command.
    toy_task.run(config, tmp_path)
    assert read_config(tmp_path).optim.lr == 0.5


def test_workdir_of_another_configuration_is_refused(finished):
    workdir, config, _, _, _ = finished
    other = toy_task.config_of(**config.to_dict())
    other.optim.lr = 0.5
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.01 in the workdir, 0\.5 now"):
        toy_task.run(other, workdir)


def test_a_start_from_classes_of_other_names_is_told(tmp_path, capfd):
    config = toy_task.config_of(init_from={"model": str(tmp_path / "trained")})
    config.model.num_classes = 2
    (tmp_path / "trained").mkdir()
    write_config(config, tmp_path / "trained", ("cat", "dog"))
    iterator = toy_task.make_iterator(config)
    iterator.class_names = ("dog", "cat")
    with pytest.raises(UserError):  # There is no checkpoint.
        train.train(config, tmp_path / "run", toy_task.make_task(config), iterator)
    assert "by name they are taken with --config.init_from.classes=1,0" in capfd.readouterr().err


def test_nan_stops_the_run_with_its_step_and_keeps_the_last_good_state(tmp_path, capfd):
    task = toy_task.make_task(toy_task.config_of(nan_at=4))

    def run(config, workdir):
        return train.train(config, workdir, task, toy_task.make_iterator(config))

    arguments = ["--config", toy_task.FILE, "--workdir", str(tmp_path / "late")]
    arguments += ["--config.nan_at=4", "--config.checkpoint_every=3"]
    assert train.main(arguments, run) == train.FAILED
    error = capfd.readouterr().err
    assert "diverged: the loss is nan at step 4; the last good checkpoint is step 3" in error
    assert "Traceback" not in error
    assert int(toy_task.state_of(tmp_path / "late", toy_task.config_of()).step) == 3
    # With no log line before the save of step 6, it is the save that finds it.
    with pytest.raises(Diverged, match="step 4; there is no checkpoint yet"):
        run(toy_task.config_of(nan_at=4, log_every=50), tmp_path / "early")


def test_fields_of_the_loop_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.log_every=0: expected at least 1"):
        toy_task.run(toy_task.config_of(log_every=0), tmp_path)
    with pytest.raises(ConfigError, match=r"config\.seed=4294967296: expected at most 4294967295"):
        toy_task.run(toy_task.config_of(seed=2**32), tmp_path)
    config = toy_task.config_of()
    with config.unlocked():
        del config.tensorboard
    with pytest.raises(ConfigError, match=r"lacks config\.tensorboard"):
        toy_task.run(config, tmp_path)
    with pytest.raises(ConfigError, match="mesh"):
        toy_task.run(toy_task.config_of(mesh={"data": 1000, "fsdp": 1, "tensor": 1}), tmp_path)


class Broken:
    """An iterator that cannot give a batch."""

    def __init__(self, error: Exception):
        self.error = error

    def __next__(self):
        raise self.error

    def close(self):
        pass


def test_data_that_end_or_break_are_named(tmp_path, capfd):
    with pytest.raises(DataError, match="ended"):
        Feed(Broken(StopIteration()), mesh=None).take()

    def run(config, workdir):
        broken = Broken(RuntimeError("shard 3 is cut"))
        return train.train(config, workdir, toy_task.make_task(config), broken)

    assert train.main(["--config", toy_task.FILE, "--workdir", str(tmp_path)], run) == UNUSABLE
    assert "error: cannot read the next batch: shard 3 is cut\n" in capfd.readouterr().err
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConnectionResetError(104, "reset"), train.FAILED), (RuntimeError("cut"), UNUSABLE)],
)
def test_where_no_batch_comes_the_last_step_is_saved(finished, tmp_path, capfd, error, code):
    """A launcher starts the run again after a fault that may pass, and nothing is lost."""
    _, config, state, _, _ = finished

    def run(config, workdir):
        rows = toy_task.Stops(toy_task.make_iterator(config), 7, error)
        return train.train(config, workdir, toy_task.make_task(config), rows)

    arguments = ["--config", toy_task.FILE, "--workdir", str(tmp_path), "--config.figures_every=8"]
    assert train.main(arguments, run) == code
    assert f"cannot read the next batch: {error}\n" in capfd.readouterr().err
    assert int(toy_task.state_of(tmp_path, config).step) == 7
    again = toy_task.run(config, tmp_path)
    toy_task.assert_same_bits(again, state)
    assert [line["step"] for line in toy_task.metrics_of(tmp_path)] == [5, 10, 15, 20]


def test_a_failed_write_is_no_wrong_command(tmp_path, capfd):
    """Launchers start a run again after it, but not after UNUSABLE."""

    def run(config, workdir):
        (tmp_path / "file").write_text("")
        Checkpoints(tmp_path / "file", 1)

    assert train.main(["--config", toy_task.FILE, "--workdir", str(tmp_path)], run) == train.FAILED
    assert "failed: cannot write checkpoints to" in capfd.readouterr().err
