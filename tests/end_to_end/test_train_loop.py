"""The training loop on a small task: what it writes, what stops it, and how exactly it resumes."""

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import children
import toy_task
from detailflow_jax import train
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.checkpoint import Checkpoints, restore_params
from detailflow_jax.runtime.config import read_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.feed import DataError, Feed
from detailflow_jax.runtime.metrics import Averages, Diverged, MetricWriter
from detailflow_jax.runtime.stop import INTERRUPTED
from detailflow_jax.tasks import TrainState
from detailflow_jax.train import FINISHED, PREEMPTED, UNUSABLE

ROOT = pathlib.Path(__file__).parents[2]
TOY = ROOT / "tests" / "helpers" / "toy_task.py"
TIMES = ("images_per_second", "seconds", "perf/")


def toy_config(**fields):
    config = toy_task.get_config()
    config.update(fields)
    return config


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{name: line[name] for name in line if not name.startswith(TIMES)} for line in lines]


def state_of(workdir, config) -> TrainState:
    """The newest checkpoint, whole."""
    task, mesh = toy_task.make_task(config), sharding.make_mesh(config.mesh)
    abstract = sharding.abstract_state(task.init, jax.random.key(0), mesh)
    with Checkpoints(workdir, 2) as checkpoints:
        return checkpoints.restore(abstract.replace(frozen={})).state


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ------------------------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, config, final state, variants traced, names of compiled functions) of a run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config, traced, compiled = toy_config(figures_every=8), [], []

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
    lines = metrics_of(workdir)
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
    assert_same_bits(restore_params(workdir), jax.device_get(state.ema))


def test_one_compilation_a_variant(finished):
    _, _, _, traced, compiled = finished
    assert sorted(traced) == [0, 1]
    assert sum("train_step" in name for name in compiled) == 2


def test_finished_run_started_again_says_so(finished, capfd):
    workdir, config, state, _, _ = finished
    before = metrics_of(workdir)
    again = train.train(config, workdir, toy_task.make_task(config), toy_task.make_iterator(config))
    assert_same_bits(again, state)
    assert metrics_of(workdir) == before
    assert "finished" in capfd.readouterr().err


def test_a_finished_run_can_be_made_longer(finished, tmp_path):
    workdir, config, _, _, _ = finished
    shutil.copytree(workdir, tmp_path / "longer")
    longer = toy_config(**config.to_dict())
    longer.total_steps += 3
    state = toy_task.run(longer, tmp_path / "longer")
    # Adam and the average go on: neither starts anew, nor stands still.
    assert int(state.opt_state[0].count) == config.total_steps + 3
    before, after = jax.tree.leaves(restore_params(workdir)), jax.tree.leaves(state.ema)
    pairs = zip(before, after, jax.tree.leaves(state.params), strict=True)
    shares = [np.abs(y - x).max() / np.abs(z - x).max() for x, y, z in pairs]
    assert all(0 < share < 0.6 for share in shares)  # 0.27 of the way, were the parameters still.
    lines = metrics_of(tmp_path / "longer")
    assert lines[: len(metrics_of(workdir))] == metrics_of(workdir)
    assert lines[-1]["step"] == config.total_steps + 3
    assert read_config(tmp_path / "longer").total_steps == config.total_steps + 3


def test_a_start_that_fails_leaves_no_configuration_behind(tmp_path):
    config = toy_config(total_steps=2)
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
    other = toy_config(**config.to_dict())
    other.optim.lr = 0.5
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.01 in the workdir, 0\.5 now"):
        toy_task.run(other, workdir)


def test_nan_stops_the_run_with_its_step_and_keeps_the_last_good_state(tmp_path, capfd):
    task = toy_task.make_task(toy_config(nan_at=4))

    def run(config, workdir):
        return train.train(config, workdir, task, toy_task.make_iterator(config))

    arguments = ["--config", str(TOY), "--workdir", str(tmp_path / "late")]
    arguments += ["--config.nan_at=4", "--config.checkpoint_every=3"]
    assert train.main(arguments, run) == train.FAILED
    error = capfd.readouterr().err
    assert "diverged: the loss is nan at step 4; the last good checkpoint is step 3" in error
    assert "Traceback" not in error
    assert int(state_of(tmp_path / "late", toy_config()).step) == 3
    # With no log line before the save of step 6, it is the save that finds it.
    with pytest.raises(Diverged, match="step 4; there is no checkpoint yet"):
        run(toy_config(nan_at=4, log_every=50), tmp_path / "early")


def test_fields_of_the_loop_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.log_every=0: expected at least 1"):
        toy_task.run(toy_config(log_every=0), tmp_path)
    config = toy_config()
    with config.unlocked():
        del config.tensorboard
    with pytest.raises(ConfigError, match=r"lacks config\.tensorboard"):
        toy_task.run(config, tmp_path)
    with pytest.raises(ConfigError, match="mesh"):
        toy_task.run(toy_config(mesh={"data": 1000, "fsdp": 1, "tensor": 1}), tmp_path)


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

    assert train.main(["--config", str(TOY), "--workdir", str(tmp_path)], run) == UNUSABLE
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

    arguments = ["--config", str(TOY), "--workdir", str(tmp_path), "--config.figures_every=8"]
    assert train.main(arguments, run) == code
    assert f"cannot read the next batch: {error}\n" in capfd.readouterr().err
    assert int(state_of(tmp_path, config).step) == 7
    again = toy_task.run(config, tmp_path)
    assert_same_bits(again, state)
    assert [line["step"] for line in metrics_of(tmp_path)] == [5, 10, 15, 20]


def test_a_failed_write_is_no_wrong_command(tmp_path, capfd):
    """Launchers start a run again after it, but not after UNUSABLE."""

    def run(config, workdir):
        (tmp_path / "file").write_text("")
        Checkpoints(tmp_path / "file", 1)

    assert train.main(["--config", str(TOY), "--workdir", str(tmp_path)], run) == train.FAILED
    assert "failed: cannot write checkpoints to" in capfd.readouterr().err


def test_feed_reads_ahead_but_remembers_what_was_taken():
    config = toy_config()
    mesh = sharding.make_mesh(config.mesh)
    with Feed(toy_task.make_iterator(config), mesh) as feed:
        whole = []
        for _ in range(3):
            whole.append(np.asarray(feed.take()["x"]))
            feed.prefetch()
            feed.prefetch()  # Once is enough.
        state, skipped = feed.state, feed.skipped
        whole += [np.asarray(feed.take()["x"]) for _ in range(2)]
    with Feed(toy_task.make_iterator(config), mesh) as feed:
        feed.set_state(state, skipped)
        again = [np.asarray(feed.take()["x"]) for _ in range(2)]
    np.testing.assert_array_equal(again, whole[3:])


def test_unknown_option_leaves_with_a_hint(tmp_path, capsys):
    arguments = ["--config", str(TOY), "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit) as leave:
        train.main([*arguments, "--batch_size=3"])
    assert leave.value.code == UNUSABLE
    assert "'--batch_size=3'" in capsys.readouterr().err
    assert train.main([*arguments, "--config.batchsize=3"]) == UNUSABLE
    assert "closest names: batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leave:
        train.main(["--help"])
    assert leave.value.code == 0
    assert "--config.batch_size=64" in capsys.readouterr().out


def test_averages_go_on_exactly_after_a_stop():
    losses = [np.float32(x) for x in np.random.default_rng(0).normal(size=9)]
    whole, first = Averages(), Averages()
    for step, loss in enumerate(losses):
        whole.add(step, {"loss": loss})
    for step, loss in enumerate(losses[:4]):
        first.add(step, {"loss": loss})
    first.fetch()
    second = Averages(json.loads(json.dumps(first.totals)))
    for step, loss in enumerate(losses[4:]):
        second.add(step, {"loss": loss})
    assert second.take_means() == whole.take_means()
    assert whole.totals == {}


def test_tensorboard_files_hold_scalars_and_figures(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    with MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.scalars(3, {"loss": 0.5, "strange": float("inf")})
        writer.figures(3, {"strip": np.zeros((4, 6, 3), np.uint8)})
    assert metrics_of(tmp_path) == [{"step": 3, "loss": 0.5, "strange": None}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    tags = {v.tag: e.step for e in EventFileLoader(str(events)).Load() for v in e.summary.value}
    assert tags == {"loss": 3, "strange": 3, "strip": 3}


def test_tensorboard_shows_a_killed_stretch_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_after, steps in (0, (1, 2, 3, 4)), (2, (3,)), (2, (3, 4, 5)):
        with MetricWriter(tmp_path, tensorboard=True, step=resumed_after) as writer:
            for step in steps:
                writer.scalars(step, {"loss": float(step)})
                writer.figures(step, {"strip": np.zeros((4, 6, 3), np.uint8)})
    folder = str(tmp_path / "tensorboard")
    events = EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Images("strip")] == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------ in real processes


def start(workdir, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, TOY, "--config", TOY, "--workdir", workdir]
    command += [f"--config.{override}" for override in ("log_every=1", *overrides)]
    return children.start(*command)


def wait_for_step(child: subprocess.Popen, workdir, step: int) -> None:
    deadline = time.monotonic() + 240
    while child.poll() is None and time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {children.finish(child, 1)}")


def test_killed_and_preempted_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    steps = "total_steps=40"
    toy_task.run(toy_config(total_steps=40, log_every=1), tmp_path / "undisturbed")

    chance = random.Random()
    kill_at, leave_at = chance.randrange(1, 22), chance.randrange(24, 39)
    print(f"SIGKILL at step {kill_at}, SIGTERM at step {leave_at}")  # Shown when the test fails.
    workdir = tmp_path / "disturbed"
    child = start(workdir, steps, "delay=0.02")
    wait_for_step(child, workdir, kill_at)
    child.kill()
    assert child.wait() == -signal.SIGKILL

    child = start(workdir, steps, "delay=0.02")
    wait_for_step(child, workdir, leave_at)
    child.terminate()
    message = children.finish(child)
    assert child.returncode == PREEMPTED, message
    (saved,) = (p for p in message.splitlines() if p.startswith("preempted: saved step "))
    saved = int(saved.split()[3].rstrip(";"))
    assert saved >= leave_at
    assert (workdir / "checkpoints" / str(saved)).exists()

    child = start(workdir, steps, "delay=0.02")
    message = children.finish(child)
    assert child.returncode == FINISHED, message
    assert f"resuming after step {saved}" in message

    config = toy_config(total_steps=40)
    assert_same_bits(state_of(workdir, config), state_of(tmp_path / "undisturbed", config))
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert without_times(lines) == without_times(metrics_of(tmp_path / "undisturbed"))


def test_second_interrupt_leaves_at_once(tmp_path):
    child = start(tmp_path, "delay=3.0")  # Two threads: two steps, then three seconds of waiting.
    wait_for_step(child, tmp_path, 2)
    child.send_signal(signal.SIGINT)
    while "asked to leave" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == INTERRUPTED
    child.stdout.close()
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_run_that_waits_for_its_next_program_can_be_asked_to_leave(tmp_path, finished):
    child = start(tmp_path, "compile_delay=90.0")
    while "step 1/20" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == PREEMPTED
    child.stdout.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    # It goes on with the batch that was there for the step that had no program yet.
    config, workdir = toy_config(), tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoints", workdir / "checkpoints")
    task, rows = toy_task.make_task(config), toy_task.make_iterator(config)
    assert_same_bits(train.train(config, workdir, task, rows), finished[2])


# -------------------------------------------------------------------------------- the launcher


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "launch" / "local.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_launcher_restarts_a_preempted_command_only(tmp_path):
    log = tmp_path / "log"
    script = f"echo x >> {log}; [ $(wc -l < {log}) -ge 3 ] && exit 7; exit {PREEMPTED}"
    assert launch("--", "bash", "-c", script).returncode == 7
    assert len(log.read_text().splitlines()) == 3
    log.unlink()
    assert launch("--max-restarts", "1", "--", "bash", "-c", script).returncode == PREEMPTED
    assert len(log.read_text().splitlines()) == 2


def test_launcher_passes_sigterm_on_and_does_not_restart(tmp_path):
    script = f"trap 'exit {PREEMPTED}' TERM; echo up; while :; do sleep 0.05; done"
    command = [str(ROOT / "launch" / "local.sh"), "--", "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        child.terminate()
        assert child.stdout.read() == ""
    assert child.returncode == PREEMPTED


def test_launcher_tells_what_it_would_do():
    dry = launch("--dry-run", "--cpu-devices", "4", "--config", "a b.py", "--workdir", "w")
    assert dry.returncode == 0
    assert "--xla_force_host_platform_device_count=4" in dry.stdout
    assert r"-m detailflow_jax.train --config a\ b.py --workdir w" in dry.stdout
    assert "--max-restarts" in launch("--help").stdout
    assert launch("--nonsense").returncode == 2
