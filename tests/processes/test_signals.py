"""Worker processes, signals and disks with faults: what a run survives, saves and leaves behind.

The faults are real: a link to /proc/self/mem answers EIO, a FIFO is a disk that does not answer.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest

import children
import toy_images
import toy_task
from detailflow_jax import train
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.errors import ReadError

MEMORY = pathlib.Path("/dev/shm")
# Limits are for a busy machine, where a start alone takes minutes.
pytestmark = [
    pytest.mark.skipif(not MEMORY.is_dir(), reason="needs Linux"),
    pytest.mark.timeout(1800),
]
LONG = {"total_steps": 100000, "delay": 0.03, "stall_seconds": 2}
GRACE = 300
"""Seconds that a run has to save where the end of its grace is not the subject."""


class Run:
    """A run that would go on for long, as the leader of a group of processes."""

    def __init__(self, folder: pathlib.Path, *overrides: str, grace: float = GRACE):
        self.images, self.workdir = folder / "images", folder / "run"
        self._output = folder / "output"
        command = [sys.executable, toy_images.PROGRAM, f"--workdir={self.workdir}"]
        command += [f"--config={toy_images.PROGRAM}:{self.images}"]
        overrides += tuple(f"{name}={value}" for name, value in LONG.items())
        command += [f"--config.{override}" for override in overrides]
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                command,
                env=children.environment(DETAILFLOW_GRACE_SECONDS=str(grace)),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def steps(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [one for one in self.family() if "--multiprocessing-fork" in one.cmdline()]

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 400
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait_for_steps(self, more: int) -> None:
        goal = self.steps + more
        self.wait_for(lambda: self.steps >= goal)

    def wait_until_it_hangs(self) -> None:
        """Until the run itself says so, of the step after the last that it finished."""
        self.wait_for(lambda: f"step {self.steps + 1} has not ended for" in self.output)

    def ended(self, seconds: float = GRACE / 2) -> int:
        """The exit code; by default it must come long before the end of the grace."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {seconds} s: {self.output}") from None


def memory(processes: list[psutil.Process]) -> set[pathlib.Path]:
    """The files in shared memory that processes use, semaphores included."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {pathlib.Path(one.path) for one in process.memory_maps()}
    return {path for path in found if path.is_relative_to(MEMORY) and path.exists()}


def batches(run: Run) -> list[pathlib.Path]:
    """Batches on their way from the worker processes, in shared memory."""
    return list(MEMORY.glob(f"detailflow-*-{run.process.pid}-*"))


def left_behind(run: Run, used: set[pathlib.Path]) -> list[pathlib.Path]:
    """What a run that has ended has left in shared memory; other runs of this machine go on."""
    return [*batches(run), *(path for path in used if path.exists())]


def all_gone(processes: list[psutil.Process], seconds: float = 60) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def hang(files: list[pathlib.Path], fifo: pathlib.Path) -> None:
    """No image answers any more."""
    os.mkfifo(fifo)
    for file in files:
        toy_images.put(file, fifo)


def parameters(workdir: pathlib.Path) -> list[np.ndarray]:
    return jax.tree.leaves(restore_params(workdir, ema=False))


def train_undisturbed(images: pathlib.Path, workdir: pathlib.Path, steps: int) -> None:
    """The first steps of the same run, in this process, with all images as they were."""
    config = toy_images.get_config(str(images))
    config.update(LONG | {"delay": 0.0, "data": {"num_workers": 0}})
    rows = toy_task.Stops(toy_images.rows(config), steps, TimeoutError("the server is away"))
    with pytest.raises(ReadError, match="cannot read the next batch: the server is away"):
        train.train(config, workdir, toy_task.make_task(config), rows)


@pytest.mark.full
def test_faults_cost_time_only_and_a_signal_to_the_group_saves_the_last_step(tmp_path):
    files = toy_images.make_folder(tmp_path / "images")
    with Run(tmp_path) as run:
        run.wait_for_steps(3)
        first = run.workers()
        assert len(first) == 2

        first[1].kill()
        run.wait_for(lambda: "started again, 1 of 5" in run.output)
        run.wait_for_steps(3)

        kept = tmp_path / "kept.png"
        kept.write_bytes(files[5].read_bytes())
        toy_images.put(files[5], "/proc/self/mem")
        run.wait_for(lambda: "Input/output error" in run.output)
        toy_images.put(files[5], kept)
        run.wait_for_steps(20)

        second, used = run.workers(), memory(run.family())
        hang(files, tmp_path / "fifo")
        run.wait_until_it_hangs()
        done = run.steps
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.ended() == train.PREEMPTED, run.output
        assert f"preempted: saved step {done}; run the same command" in run.output
        assert "Traceback" not in run.output and "leaked" not in run.output, run.output
    assert all_gone([*first, *second])
    assert used and not left_behind(run, used)

    for file in files:
        file.unlink()
    toy_images.make_folder(tmp_path / "images")
    train_undisturbed(tmp_path / "images", tmp_path / "undisturbed", done)
    pairs = zip(parameters(tmp_path / "run"), parameters(tmp_path / "undisturbed"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.full
def test_nothing_is_left_of_a_killed_run(tmp_path):
    toy_images.make_folder(tmp_path / "images")
    with Run(tmp_path) as run:
        run.wait_for_steps(3)
        family = run.family()
        used = memory(family)
        run.wait_for(lambda: batches(run))
        run.process.kill()
        assert all_gone(family)
    assert not left_behind(run, used)


@pytest.mark.full
@pytest.mark.parametrize("workers", [2, 8])
def test_a_signal_to_the_group_saves_the_last_step_and_leaves_nothing(tmp_path, workers):
    toy_images.make_folder(tmp_path / "images")
    for number in (signal.SIGINT, signal.SIGTERM):
        with Run(tmp_path, f"data.num_workers={workers}") as run:
            run.wait_for_steps(3)
            family = run.family()
            used = memory(family)
            assert len(run.workers()) == workers
            os.killpg(run.process.pid, number)
            assert run.ended() == train.PREEMPTED, run.output
            assert f"preempted: saved step {run.steps};" in run.output
            assert "Traceback" not in run.output and "leaked" not in run.output, run.output
            assert all_gone(family)
        assert used and not left_behind(run, used)
        assert (run.workdir / "checkpoints" / str(run.steps)).exists()
    with Run(tmp_path, f"data.num_workers={workers}") as run:
        run.wait_for_steps(3)
        family = run.family()
        used = memory(family)
        run.process.kill()
        assert all_gone(family)
    assert used and not left_behind(run, used)


TWO = """
import sys, time
from detailflow_jax.runtime import distributed
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
from detailflow_jax.runtime.stop import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    step = 1
    while not stop.requested(step):
        step += 1
        time.sleep(0.05)
    print("leaves after", step, flush=True)
    time.sleep(1000)
"""


def test_two_processes_leave_after_the_same_step_and_in_time(tmp_path):
    """Ctrl-C reaches one of them; then both get SIGTERM while they do not come to an end."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    variables = {"DETAILFLOW_GRACE_SECONDS": "2"}
    command = [sys.executable, "-c", TWO, address]
    pair = [children.start(*command, number, **variables) for number in "01"]
    for child in pair:
        while child.stdout.readline() != "ready\n":
            assert child.poll() is None
    pair[1].send_signal(signal.SIGINT)
    left = []
    for child in pair:
        while "leaves after" not in (line := child.stdout.readline()):
            assert child.poll() is None
        left.append(line)
    assert left[0] == left[1]
    for child in reversed(pair):  # Process 0 last: without it the other one cannot go on.
        child.terminate()
    for child in pair:
        printed = children.finish(child)
        assert child.returncode == train.PREEMPTED, printed
        assert "still here 2 s after SIGTERM" in printed


@pytest.mark.full
def test_a_disk_that_does_not_answer_keeps_no_run_beyond_its_grace(tmp_path):
    """Without worker processes it is a thread of the run that hangs, which cannot be ended."""
    files, grace = toy_images.make_folder(tmp_path / "images"), 30
    with Run(tmp_path, "data.num_workers=0", grace=grace) as run:
        run.wait_for_steps(3)
        hang(files, tmp_path / "fifo")
        run.wait_until_it_hangs()
        run.process.terminate()
        run.wait_for(lambda: "asked to leave" in run.output)
        assert run.ended(2.5 * grace) == train.PREEMPTED, run.output
        assert f"preempted: saved step {run.steps};" in run.output
        assert f"still here {grace} s after SIGTERM" in run.output
    assert (tmp_path / "run" / "checkpoints" / str(run.steps)).exists()


def test_a_program_without_a_main_guard_reads_with_worker_processes(tmp_path):
    toy_images.make_folder(tmp_path / "images")
    program = tmp_path / "program.py"
    program.write_text(
        f"""
from detailflow_jax.data import make_iterator
data = dict(source="folder:{tmp_path}/images", image_size=8, crop="none", num_workers=1)
print(next(make_iterator(data, batch_size=4, seed=0))["image"].shape)
"""
    )
    assert children.run(program) == "(4, 8, 8, 3)\n"


REMOVED_TWICE = """
from multiprocessing import resource_tracker
from detailflow_jax.data.workers import _NamedMemory
memory = _NamedMemory(create=True, size=8)
again = _NamedMemory(memory.name)
memory.unlink()
resource_tracker.register(again._name, "shared_memory")  # As by a thread that comes late with it.
again.unlink()
"""


@pytest.mark.full
def test_memory_that_two_threads_remove_is_no_leak():
    assert children.run("-c", REMOVED_TWICE) == ""
