"""The page about a run: captions are text, names are escaped, plots are vector graphics."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from detailflow_jax.evaluate import report


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)


def test_grid_has_every_picture_and_caption(images):
    text = report.grid_html(images, 3, rows=["4", "<b>"], heads=["a", "b", "c"], corner="tokens")
    assert re.findall(r"<span[^>]*>([^<]*)</span>", text) == ["tokens", *"abc", "4", "&lt;b&gt;"]
    assert re.findall('alt="([^"]*)"', text)[:2] == ["4, a", "4, b"]
    pictures = [base64.b64decode(x) for x in re.findall('base64,([^"]*)', text)]
    opened = [Image.open(io.BytesIO(x)) for x in pictures]
    assert [x.size for x in opened] == [(12, 12)] * 6
    # Smoothly enlarged: the middle of each block of 3 x 3 pixels is near the pixel it comes from.
    middles = np.stack([np.asarray(x)[1::3, 1::3] for x in opened]).astype(int)
    assert np.abs(middles - images).mean() < 8
    assert "grid-template-columns: auto repeat(3" in text


def test_curve_is_a_vector_graphic_of_all_runs():
    runs = {"one": [{"step": 1, "loss": 2.0}, {"step": 2}], "two": [{"step": 1, "loss": 1.0}]}
    svg = report.curve(runs, "loss")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "<image" not in svg
    assert all(color in svg for color in report._LINES[:2])


def test_page_is_for_phones_and_for_both_schemes(images):
    sections = {"First": [report.grid_html(images, 3)], "Next": [report.text_html("a < b")]}
    text = report.page("A & B", "lead", sections)
    assert '<meta name="viewport" content="width=device-width' in text
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text
    assert re.findall("<h[12]>([^<]*)", text) == ["A &amp; B", "First", "Next"]
    assert "a &lt; b" in text
    assert "http" not in re.sub(r"xmlns\S*", "", text)  # nothing is loaded from elsewhere


def test_commands_are_for_copying():
    assert "<pre>make demo</pre>" in report.commands_html({"again": "make demo"})
    command = report.commands_html({"more": "detailflow generate --out a-b<c"})
    assert "<pre>detailflow generate <span>--out</span> a-b&lt;c</pre>" in command
