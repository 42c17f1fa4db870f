"""The training loop in real processes, killed and asked to leave: it resumes to the same bits."""

import random
import shutil
import signal
import subprocess
import sys
import time

import children
import toy_task
from detailflow_jax.runtime.stop import INTERRUPTED
from detailflow_jax.train import FINISHED, PREEMPTED


def start(workdir, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, toy_task.FILE, "--config", toy_task.FILE, "--workdir", workdir]
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
    toy_task.run(toy_task.config_of(total_steps=40, log_every=1), tmp_path / "undisturbed")

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

    config = toy_task.config_of(total_steps=40)
    toy_task.assert_same_bits(
        toy_task.state_of(workdir, config), toy_task.state_of(tmp_path / "undisturbed", config)
    )
    lines = toy_task.metrics_of(workdir)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert toy_task.without_times(lines) == toy_task.without_times(
        toy_task.metrics_of(tmp_path / "undisturbed")
    )


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


def test_a_run_that_waits_for_its_next_program_can_be_asked_to_leave(tmp_path):
    child = start(tmp_path, "compile_delay=90.0")
    while "step 1/20" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == PREEMPTED
    child.stdout.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    # It goes on with the batch that was there for the step that had no program yet.
    config, workdir = toy_task.config_of(), tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoints", workdir / "checkpoints")
    undisturbed = toy_task.run(config, tmp_path / "undisturbed")
    toy_task.assert_same_bits(toy_task.run(config, workdir), undisturbed)
