"""What the demos share: stages that resume, the digits, the report, and the command line."""

import argparse
import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from detailflow_jax import data
from detailflow_jax.evaluate import report
from detailflow_jax.runtime import extras, files, pictures
from detailflow_jax.runtime.command import program_name
from detailflow_jax.runtime.errors import UserError
from detailflow_jax.runtime.files import write_atomically

SAMPLES_PER_CLASS = 50
LABELS = np.repeat(np.arange(10), SAMPLES_PER_CLASS)
"""Classes of the samples: equally many of each digit."""

Rows = list[tuple[str, str]]


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


def held_out_digits() -> np.ndarray:
    """The digits that no model was trained on: uint8 [B, 32, 32, 3]."""
    return np.stack([example["image"] for example in data.make_source("digits:test")])


def by_class(samples: np.ndarray) -> np.ndarray:
    """Samples of `LABELS` [B, ...] -> [10, SAMPLES_PER_CLASS, ...]."""
    return samples.reshape(10, SAMPLES_PER_CLASS, *samples.shape[1:])


def class_grid(images: np.ndarray) -> np.ndarray:
    """Eight images of each class of `LABELS`, one column per class: uint8 [H, W, 3]."""
    rows = by_class(images)[:, :8].swapaxes(0, 1)
    captions = [str(label) for label in range(10)]
    flat = rows.reshape(-1, *images.shape[1:])
    return pictures.grid(flat, columns=10, scale=2, column_captions=captions)


def write_report(
    out: pathlib.Path,
    title: str,
    figures: dict,
    rows: Rows,
    shown: Mapping[str, tuple[str, np.ndarray]],
    curves: Mapping[str, bytes],
) -> None:
    """Writes figures.json, the pictures as PNG, and report.html, each atomically.

    Args:
      out: the folder.
      title: of the page.
      figures: what figures.json holds.
      rows: the same as a table for people.
      shown: name of the PNG -> caption and picture, uint8 [H, W, 3].
      curves: caption -> plot of a training, as PNG bytes.
    """
    for name, (_, picture) in shown.items():
        pictures.save_png(out / f"{name}.png", picture)
    plots = {caption: report.png(picture) for caption, picture in shown.values()} | curves
    parts = [
        "<p>Everything below comes from one run on scikit-learn's handwritten digits: trained, "
        "sampled and measured on this machine.</p>",
        report.table_html(rows),
        *(report.figure_html(caption, plot) for caption, plot in plots.items()),
    ]
    write_atomically(out / "report.html", report.page(title, parts).encode())
    write_atomically(out / "figures.json", json.dumps(figures, indent=2).encode())


def main(
    argv: Sequence[str] | None,
    command: str,
    default: str,
    run: Callable[[pathlib.Path], dict],
    table: Callable[[dict], Rows],
) -> int:
    """The command line of a demo: runs it, prints its table, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program_name(command),
        description="Train, sample and report on handwritten digits, in minutes on a CPU.",
    )
    parser.add_argument("--out", default=default, help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        out = files.local_path(args.out, "--out")
        for module in ("sklearn.datasets", "matplotlib.figure"):  # Before training, not after it.
            extras.require(module)
        figures = run(out)
    except UserError as error:
        return error.report()
    rows = table(figures)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>9}" for name, value in rows))
    print(f"\nreport: {out / 'report.html'}")
    return 0


def seconds_table(seconds: Mapping[str, float]) -> Rows:
    """Seconds of every stage and their sum, as rows for people."""
    rows = [(f"seconds: {name}", f"{value:.1f}") for name, value in seconds.items()]
    return [*rows, ("seconds: all", f"{sum(seconds.values()):.1f}")]
