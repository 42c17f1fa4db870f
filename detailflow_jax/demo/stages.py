"""What the demos share: stages that resume, their clock, and the command line."""

import argparse
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from detailflow_jax.runtime import extras
from detailflow_jax.runtime.command import program_name
from detailflow_jax.runtime.errors import UserError
from detailflow_jax.runtime.files import write_atomically


class Stages:
    """Runs each stage once and remembers in seconds.json what it took, over all attempts."""

    def __init__(self, out: pathlib.Path):
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "seconds.json"
        stored = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.seconds: dict[str, float] = stored.get("seconds", {})
        self._finished: list[str] = stored.get("finished", [])

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is done within; a stage finished before is not counted again."""
        print(f"\n== {name} ==", flush=True)
        start = time.perf_counter()
        try:
            yield
            finished = [name]
        except BaseException:
            finished = []
            raise
        finally:
            if name not in self._finished:
                spent = time.perf_counter() - start
                self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 1)
                self._finished += finished
                stored = {"seconds": self.seconds, "finished": self._finished}
                write_atomically(self._path, json.dumps(stored, indent=2).encode())


def seconds_table(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    """Seconds of every stage and their sum, as rows for people."""
    rows = [(f"seconds: {name}", f"{value:.1f}") for name, value in seconds.items()]
    return [*rows, ("seconds: all", f"{sum(seconds.values()):.1f}")]


def main(
    argv: Sequence[str] | None,
    command: str,
    default: str,
    run: Callable[[pathlib.Path], dict],
    table: Callable[[dict], list[tuple[str, str]]],
) -> int:
    """The command line of a demo: runs it, prints its table, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program_name(command),
        description="Train, sample and report on handwritten digits, in minutes on a CPU.",
    )
    parser.add_argument("--out", default=default, help="folder (default: %(default)s)")
    out = pathlib.Path(parser.parse_args(argv).out)
    try:
        for module in ("sklearn.datasets", "matplotlib.figure"):  # Before training, not after it.
            extras.require(module)
        figures = run(out)
    except UserError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 2
    rows = table(figures)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>9}" for name, value in rows))
    print(f"\nreport: {out / 'report.html'}")
    return 0
