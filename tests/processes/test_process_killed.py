"""Of two processes that train together one is killed; started again, they lose nothing."""

import json
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import psutil
import pytest

import children
from detailflow_jax.runtime.checkpoint import restore_params

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "helpers" / "toy_task.py"


def launch(workdir: pathlib.Path, *options: str, steps: int, delay: float, **variables: str):
    command = [ROOT / "launch" / "local.sh", "-n", "2", "--cpu-devices", "2", *options, "--"]
    command += ["python", PROGRAM, f"--config={PROGRAM}", f"--workdir={workdir}"]
    command += [f"--config.total_steps={steps}", "--config.mesh.fsdp=4"]
    command += ["--config.log_every=1", "--config.checkpoint_every=5", f"--config.delay={delay}"]
    return children.start(*command, **variables)


def log(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def trainers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The two processes in order of their number; fewer while some start or leave."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            number = process.environ().get("JAX_PROCESS_ID")
        except psutil.Error:
            continue
        if number is not None and str(PROGRAM) in process.cmdline():
            found.setdefault(number, process)
    return [found[number] for number in sorted(found)]


def kill(launcher: subprocess.Popen, number: int, condition) -> None:
    """SIGKILL to one of the two as soon as the condition holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    trainers(launcher)[number].send_signal(signal.SIGKILL)


def between_saves(workdir: pathlib.Path) -> bool:
    return len(log(workdir)) >= 8 and (workdir / "checkpoints/5").exists()


@pytest.mark.full
def test_steps_after_a_kill_repeat_those_before_it(tmp_path):
    patience = {"DETAILFLOW_KILL_SECONDS": "2"}
    with launch(tmp_path, "--max-failures", "1", steps=20, delay=0.1, **patience) as child:
        kill(child, 1, lambda: between_saves(tmp_path))
        before = log(tmp_path)
        output = children.finish(child)
    assert child.returncode == 0, output
    assert output.count("starting again") == 1, output
    assert output.count("resuming after step") == 1, output
    losses = [(line["step"], line["loss"]) for line in log(tmp_path)]
    assert [step for step, _ in losses] == list(range(1, 21))
    assert [(line["step"], line["loss"]) for line in before] == losses[: len(before)]


@pytest.mark.full
def test_either_process_is_killed_and_the_run_ends_with_the_same_bits(tmp_path):
    steps, undisturbed, workdir = 60, tmp_path / "undisturbed", tmp_path / "run"
    child = launch(undisturbed, steps=steps, delay=0.0)
    output = children.finish(child)
    assert child.returncode == 0, output

    with launch(workdir, "--max-failures", "2", steps=steps, delay=0.1) as child:
        # A worker between its saves, then the one that leads, in the middle of a save.
        kill(child, 1, lambda: between_saves(workdir))
        before = len(log(workdir))
        saving = lambda: any((workdir / "checkpoints").glob("*tmp*"))  # noqa: E731
        kill(child, 0, lambda: len(log(workdir)) > before and saving())
        output = children.finish(child)
    assert child.returncode == 0, output
    assert output.count("starting again") == 2, output
    assert output.count("resuming after step") == 2, output

    runs = undisturbed, workdir
    for ema in (False, True):
        states = [jax.tree.leaves(restore_params(run, ema=ema)) for run in runs]
        for a, b in zip(*states, strict=True):
            np.testing.assert_array_equal(a, b)
    losses = [[(line["step"], line["loss"]) for line in log(run)] for run in runs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, steps + 1))
