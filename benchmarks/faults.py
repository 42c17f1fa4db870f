"""Training under random faults: what is lost, what stays behind, whether the bits are the same.

    python benchmarks/faults.py --faults 200 --out runs/faults

Runs of a toy network on a folder of images, every other one with its workdir in a bucket: the real
fake-gcs-server behind a proxy that makes faults. Each is struck some ten times at random moments,
started again whenever it has ended, and must end with the parameters of a run that was left alone.
Uses the tests' helpers, so it needs a clone; Linux.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402

import bucket_server  # noqa: E402
import toy_images  # noqa: E402
from detailflow_jax import train  # noqa: E402
from detailflow_jax.runtime import distributed  # noqa: E402
from detailflow_jax.runtime.checkpoint import restore_params  # noqa: E402

MEMORY = pathlib.Path("/dev/shm")
SIGNALS = {
    "SIGKILL": (os.kill, signal.SIGKILL),
    "SIGTERM": (os.kill, signal.SIGTERM),
    "SIGTERM to the group": (os.killpg, signal.SIGTERM),
    "SIGINT to the group": (os.killpg, signal.SIGINT),
}
WORKER, DISK = "SIGKILL of a worker", "EIO of all images"
SERVER = {"503": 503, "requests cut off": bucket_server.CUT}
EVERY, MOST = 5, 14  # Steps between checkpoints; most steps between faults.
PASSES = (0.3, 4.0)  # Seconds that a fault of a disk or server lasts.
PATIENCE = 120  # Seconds without a word after which a run counts as stuck.


# ------------------------------------------------------------- processes that start without imports


def serve() -> None:
    """Forks a training process for each line of standard input, and tells how it ended."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            os.setsid()
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            distributed.leave(train.main(request["arguments"], toy_images.run))


class Starter:
    """Starts training processes; a context manager."""

    def __init__(self, variables: dict[str, str]):
        self._server = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._server.stdin.close()
        self._server.wait(30)

    def ask(self, **request) -> int:
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())


# ------------------------------------------------------------------------------------------ the run


@dataclasses.dataclass
class Struck:
    """One fault and what came of it."""

    place: str
    kind: str
    workers: int
    step: int = 0  # the last that was logged before it
    code: int | None = None  # of the process, None if it went on
    lost: int = 0  # steps that were done again
    orphans: int = 0
    memory: int = 0  # objects left in shared memory


class Run:
    """A run that is started again and again."""

    def __init__(self, starter: Starter, out: pathlib.Path, workdir: str, steps: int):
        self._starter, self._output = starter, out / "output"
        self._arguments = [f"--config={toy_images.PROGRAM}:{out / 'images'}"]
        self._arguments += [f"--workdir={workdir}", f"--config.total_steps={steps}"]
        self._arguments += [f"--config.checkpoint_every={EVERY}", "--config.delay=0.02"]
        self.workdir = workdir

    def start(self, workers: int) -> None:
        self._output.unlink(missing_ok=True)
        arguments = [*self._arguments, f"--config.data.num_workers={workers}"]
        self.workers = workers
        self.pid = self._starter.ask(output=str(self._output), arguments=arguments)

    def text(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    @property
    def step(self) -> int:
        found = re.findall(r"^(?:step|resuming after step) (\d+)", self.text(), re.MULTILINE)
        return int(found[-1]) if found else 0

    @property
    def resumed(self) -> int:
        found = re.search(r"^resuming after step (\d+)", self.text(), re.MULTILINE)
        return int(found[1]) if found else 0

    def alive(self) -> bool:
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def wait_for(self, more: int) -> bool:
        """Waits for further steps; returns whether the process is still there."""
        goal = self.step + more
        self._wait(lambda: not self.alive() or self.step >= goal)
        return self.alive()

    def _wait(self, condition) -> None:
        text, since = "", time.monotonic()
        while not condition():
            if (now := self.text()) != text:
                text, since = now, time.monotonic()
            elif time.monotonic() > since + PATIENCE:
                raise RuntimeError(f"silent for {PATIENCE} s: {text[-3000:]}")
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def end(self, struck: Struck, family: list[psutil.Process]) -> None:
        """Waits for the end of the process, and looks at what it leaves."""
        self._wait(lambda: not self.alive())
        struck.code = self._starter.ask(wait=self.pid)
        helpers = [x for x in family if x.is_running()]
        struck.orphans = len(psutil.wait_procs(helpers, timeout=10)[1])
        struck.memory = len(list(MEMORY.glob(f"detailflow-*-{self.pid}-*")))


def strike(run: Run, struck: Struck, images: list[pathlib.Path], proxy) -> None:
    """Strikes a run, waits until a passing fault has passed, and for the end after a signal."""
    family = run.family()
    struck.step = run.step
    if struck.kind in SIGNALS:
        send, number = SIGNALS[struck.kind]
        send(run.pid, number)
        run.end(struck, family)
    elif struck.kind == WORKER:
        random.choice([x for x in family if "--multiprocessing-fork" in x.cmdline()]).kill()
    elif struck.kind == DISK:
        contents = [image.read_bytes() for image in images]
        for image in images:
            toy_images.put(image, "/proc/self/mem")
        time.sleep(random.uniform(*PASSES))
        for image, content in zip(images, contents, strict=True):
            new = image.with_suffix(".new")
            new.write_bytes(content)
            os.replace(new, image)
    else:
        proxy.fault = lambda method, path: SERVER[struck.kind]
        time.sleep(random.uniform(*PASSES))
        proxy.heal()


def suffer(run: Run, place: str, faults: int, images: list[pathlib.Path], proxy) -> list[Struck]:
    """Strikes a run, then lets it finish."""
    kinds = [*SIGNALS, DISK, *(SERVER if place == "bucket" else [])]
    found: list[Struck] = []
    run.start(random.randint(0, 1))
    while len(found) < faults and run.wait_for(random.randint(1, MOST)):
        time.sleep(random.uniform(0, 0.4))  # Perhaps into a save.
        kind = random.choice([*kinds, WORKER] if run.workers else kinds)
        struck = Struck(place, kind, run.workers)
        found.append(struck)
        strike(run, struck, images, proxy)
        if struck.code is None and not run.wait_for(2):
            run.end(struck, [])
        if struck.code is not None:
            before = run.step
            run.start(random.randint(0, 1))
            run.wait_for(1)
            struck.lost = max(before - run.resumed, 0)
        print(f"{time.strftime('%H:%M:%S')} {struck}", file=sys.stderr, flush=True)
    last = Struck(place, "none", run.workers)
    run.end(last, [])
    if last.code != 0:
        raise RuntimeError(f"it left with {last.code}: {run.text()[-3000:]}")
    return found


def same_bits(a: str, b: str) -> bool:
    trees = [restore_params(run, ema=ema) for run in (a, b) for ema in (False, True)]
    pairs = zip(*map(jax.tree.leaves, (trees[:2], trees[2:])), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def table(found: list[Struck], same: list[bool]) -> str:
    lines = ["|workdir|fault|tried|exit codes|steps lost, most (all)|orphans|shared memory left|"]
    lines += ["|-|-|-|-|-|-|-|"]
    groups = collections.defaultdict(list)
    for struck in found:
        groups[struck.place, struck.kind].append(struck)
    for (place, kind), group in sorted(groups.items()):
        codes = collections.Counter("goes on" if s.code is None else str(s.code) for s in group)
        shown = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))
        lost = [s.lost for s in group]
        cells = [place, kind, len(group), shown, f"{max(lost)} ({sum(lost)})"]
        cells += [sum(s.orphans for s in group), sum(s.memory for s in group)]
        lines.append("|".join(["", *map(str, cells), ""]))
    lines += ["", f"{len(found)} faults, {sum(same)} of {len(same)} runs end with the same bits."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--faults", type=int, default=200, help="how many in all")
    parser.add_argument("--runs", type=int, default=20, help="in which these are made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/faults"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    random.seed(args.seed)
    out = args.out.resolve()
    images = toy_images.make_folder(out / "images")
    each = -(-args.faults // args.runs)
    steps = each * (MOST + 3)
    found, same = [], []
    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(bucket_server.shared())
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
        compiled |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        starter = stack.enter_context(Starter(bucket.variables | compiled))
        alone = Run(starter, out, str(out / "alone"), steps)
        alone.start(workers=0)
        alone.end(Struck("", "", 0), [])
        for number in range(args.runs):
            name = f"run_{os.getpid()}_{number}"
            place, workdir = ("bucket", bucket.path(name)) if number % 2 else ("disk", out / name)
            run = Run(starter, out, str(workdir), steps)
            found += suffer(run, place, each, images, bucket.proxy)
            same.append(same_bits(run.workdir, alone.workdir))
            (out / "faults.json").write_text(json.dumps([vars(x) for x in found]))
            print(table(found, same), file=sys.stderr, flush=True)
    print(table(found, same))


if __name__ == "__main__":
    main()
