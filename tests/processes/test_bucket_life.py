"""The life of a run on a pod, its workdir in a bucket: two processes, signals, kills and faults."""

import json
import pathlib
import shutil
import subprocess
import time

import jax
import numpy as np
import psutil
import pytest

import bucket_server
import children
from detailflow_jax.runtime.checkpoint import restore_params

ROOT = pathlib.Path(__file__).parents[2]
STEPS, PROGRAM = 30, ROOT / "tests" / "helpers" / "toy_task.py"
TWO, ONE = ("-n", "2", "--cpu-devices", "4"), ("--cpu-devices", "8")


def launch(bucket, workdir, *options: str, every: int = 1, delay: float = 0.0):
    command = [ROOT / "launch" / "local.sh", *options, "--max-restarts", "0", "--"]
    command += ["python", PROGRAM, f"--config={PROGRAM}", f"--workdir={workdir}"]
    command += [f"--config.total_steps={STEPS}", f"--config.delay={delay}", "--config.mesh.fsdp=4"]
    command += [f"--config.checkpoint_every={every}", "--config.keep_checkpoints=100"]
    command += ["--config.log_every=1", "--config.figures_every=5", "--config.tensorboard=True"]
    return children.start(*command, **bucket.variables)


def saved(bucket) -> list[int]:
    """The steps of the whole checkpoints, by what is in the bucket."""
    ends = ("checkpoints", "commit_success.txt")
    parts = [name.split("/")[1:] for name in bucket.names("run/checkpoints/")]
    return sorted(int(p[1]) for p in parts if len(p) == 3 and (p[0], p[2]) == ends)


def wait(child: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(child: subprocess.Popen, code: int) -> str:
    printed = children.finish(child)
    assert child.returncode == code, printed
    return printed


def kill(child: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all that it started."""
    family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
    children.signal_all(family, 9)
    child.communicate()


def lines(text: str | bytes) -> list[tuple]:
    found = [json.loads(line) for line in text.splitlines()]
    return [(x["step"], x["loss"], x["skipped"]) for x in found]


@pytest.mark.full
def test_a_run_in_a_bucket_survives_what_happens_on_a_pod(tmp_path):
    with bucket_server.shared() as bucket:
        place, proxy = bucket.path("run/"), bucket.proxy
        # Two processes get SIGTERM.
        child = launch(bucket, place, *TWO, every=4, delay=0.3)
        wait(child, lambda: saved(bucket))
        child.terminate()
        printed = end(child, 143)
        left = saved(bucket)[-1]
        assert printed.count(f"saved step {left};") == 2 and left < STEPS - 12

        # One process goes on, and is killed in the middle of a save.
        child = launch(bucket, place, *ONE, every=4, delay=0.3)
        wait(child, lambda: saved(bucket)[-1] > left)
        seen = len(proxy.seen)
        uploads = lambda: [x for x in proxy.seen[seen:] if "/upload/" in x and "/state" in x]  # noqa: E731
        proxy.delay = 0.05
        wait(child, uploads)
        kill(child)
        before = saved(bucket)

        # The next one meets 50 ms a request, 4 s without an answer, and broken uploads.
        cuts, start = [bucket_server.CUT] * 3, []

        def fault(method: str, path: str) -> int | str | None:
            if "upload" in path and "checkpoints" in path:
                start.append(time.monotonic())
                if time.monotonic() - start[0] < 4:
                    return 503
                return cuts.pop() if cuts and method in ("POST", "PUT") else None
            return None

        proxy.fault = fault
        printed = end(launch(bucket, place, *ONE, every=4, delay=0.3), 0)
        assert start and not cuts
        assert f"resuming after step {before[-1]} of {STEPS}" in printed
        proxy.heal()

        # The same life on a disk: two processes until that step, then one.
        local = tmp_path / "run"
        end(launch(bucket, local, *TWO), 0)
        for folder in (local / "checkpoints").iterdir():
            if folder.name.isdigit() and int(folder.name) > left:
                shutil.rmtree(folder)
        end(launch(bucket, local, *ONE), 0)
        for ema in (False, True):
            states = [jax.tree.leaves(restore_params(run, ema=ema)) for run in (local, place)]
            for a, b in zip(*states, strict=True):
                np.testing.assert_array_equal(a, b)
        log = bucket.read("run/metrics.jsonl")
        assert lines(log) == lines((local / "metrics.jsonl").read_text())
        names = bucket.names("run/")
        assert {f"run/figures/inputs_{step:06d}.png" for step in range(5, 31, 5)} <= set(names)
        assert "run/.lock" not in names and any("tensorboard/" in name for name in names)


@pytest.mark.full
def test_two_processes_do_not_start_where_they_cannot_save():
    with bucket_server.shared() as bucket:
        printed = end(launch(bucket, "gs://no-such-bucket/run", *TWO), 2)
        assert "there is no such bucket" in printed and "Traceback" not in printed, printed
        bucket.proxy.fault = lambda method, path: 403
        printed = end(launch(bucket, bucket.path("refused"), *TWO), 2)
        assert "may it read and write there" in printed and "Traceback" not in printed, printed
        assert not bucket.names("refused")
