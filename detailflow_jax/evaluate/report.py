"""One self-contained HTML page about a run: pictures, figures and curves.

It reads on a phone and on a wide screen, on light and on dark. Captions are text of the page, not
pixels, and plots are vector graphics.
"""

import base64
import html
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from detailflow_jax.runtime import extras, files, pictures

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6370; --line: #d9dce1;
  --page: #fff; --box: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a0a7b4; --line: #3a3f47;
  --page: #15171a; --box: #202328; } }
* { box-sizing: border-box; }
body { font: 17px/1.55 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
.lead { color: var(--soft); margin-top: 0; }
.grid { display: grid; gap: 3px; align-items: center; margin: 1rem 0; font-size: .8rem; }
.grid img { width: 100%; display: block; border-radius: 2px; }
.grid span { color: var(--soft); text-align: center; }
.grid .row { text-align: right; padding-right: .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1rem; }
.plots figure { margin: 0; }
svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  font-weight: normal; vertical-align: top; }
td { text-align: right; padding-left: 1rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
pre { background: var(--box); padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
pre span { white-space: nowrap; }
"""
_INK = "#808080"  # Of axes and their texts: legible on light and on dark.
_LINES = ("#3b82f6", "#f97316", "#10b981", "#d946ef")


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, one per log step."""
    return files.read_json_lines(files.path(workdir) / "metrics.jsonl")


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


def curve(runs: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> str:
    """A metric over the steps, one line per run, as an SVG element."""
    figure = extras.require("matplotlib.figure").Figure(figsize=(4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    for color, (run, lines) in zip(_LINES, runs.items(), strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=run, color=color, linewidth=2)
    if len(runs) > 1:
        axes.legend(labelcolor=_INK, framealpha=0)
    axes.set_xlabel("step", color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color=_INK, alpha=0.25)
    axes.spines[:].set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def plots_html(plots: Mapping[str, str]) -> str:
    """SVG plots beside each other as far as there is room; caption -> SVG."""
    figures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, svg in plots.items()
    )
    return f'<div class="plots">{figures}</div>'


def grid_html(
    images: np.ndarray,
    columns: int,
    *,
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    corner: str = "",
) -> str:
    """A grid of pictures uint8 [N, H, W, 3], row by row, with captions that are text.

    Args:
      images: small pictures; each is enlarged smoothly, so that no screen shows its pixels.
      columns: pictures per row.
      rows: one caption per row.
      heads: one caption per column.
      corner: what the captions of the rows are, above them.
    """
    cells = []
    if heads:
        cells += [f'<span class="row">{html.escape(corner)}</span>'] if rows else []
        cells += [f"<span>{html.escape(head)}</span>" for head in heads]
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        if rows and not column:
            cells.append(f'<span class="row">{html.escape(rows[row])}</span>')
        parts = [rows[row]] if rows else []
        parts += [heads[column]] if heads else []
        large = Image.fromarray(image)
        large = large.resize((3 * large.width, 3 * large.height), Image.Resampling.BICUBIC)
        data = base64.b64encode(pictures.png(np.asarray(large), optimize=True)).decode()
        alt = html.escape(", ".join(parts))
        cells.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
    template = ("auto " if rows else "") + f"repeat({columns}, minmax(0, 1fr))"
    return f'<div class="grid" style="grid-template-columns: {template}">{"".join(cells)}</div>'


def table_html(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def text_html(*paragraphs: str) -> str:
    """Paragraphs of plain text."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in paragraphs)


def commands_html(commands: Mapping[str, str]) -> str:
    """Commands to copy: what each does -> the command. No line ends between the dashes of one."""
    whole = lambda command: re.sub(r"(?<!\S)--\S+", r"<span>\g<0></span>", html.escape(command))  # noqa: E731
    return "".join(
        f"<p>{html.escape(what)}</p><pre>{whole(command)}</pre>"
        for what, command in commands.items()
    )


def page(title: str, lead: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The whole page.

    Args:
      title: its heading.
      lead: a line below it.
      sections: heading -> HTML parts, in order.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "".join(f"<h2>{html.escape(name)}</h2>{''.join(x)}" for name, x in sections.items())
    top = f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{top}{body}</body></html>'
