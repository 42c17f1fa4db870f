"""One self-contained HTML page about a run: figures, curves and pictures."""

import base64
import html
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from detailflow_jax.runtime import extras, files

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ccc; }
td { font-variant-numeric: tabular-nums; } figcaption { color: #555; } figure { margin: 1rem 0; }
"""


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, one per log step."""
    lines = files.read_bytes(files.path(workdir) / "metrics.jsonl").splitlines()
    return [json.loads(line) for line in lines]


def panels(titles: Sequence[str], draw: Callable[[Any, str], None], xlabel: str) -> bytes:
    """Plots side by side, as PNG bytes; `draw(axes, title)` fills each."""
    size = (4 * len(titles), 3)
    figure = extras.require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    for i, title in enumerate(titles):
        axes = figure.add_subplot(1, len(titles), i + 1, title=title, xlabel=xlabel)
        draw(axes, title)
        axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]) -> bytes:
    """Line plots of the metrics `names`, one panel per metric, one line per run: PNG bytes."""

    def draw(axes, name: str) -> None:
        for k, (run, lines) in enumerate(runs.items()):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=run, color=f"C{k}")
        if len(runs) > 1:
            axes.legend()

    return panels(names, draw, "step")


def png(picture: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3] as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="png")
    return stream.getvalue()


def figure_html(caption: str, picture: bytes) -> str:
    """A PNG inside the page, with a caption."""
    data = base64.b64encode(picture).decode()
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def table_html(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns."""
    cells = "".join(
        f"<tr><th align=left>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page: a heading and the parts, in order."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>{head}<h1>{html.escape(title)}</h1>{''.join(parts)}"
