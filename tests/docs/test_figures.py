"""The figures of the documentation are made, and each is shown on the page."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_figures", DOCS / "figures" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_every_figure_is_made_and_shown(make, tmp_path):
    made = {path.name for path in make.make(tmp_path) if path.stat().st_size > 1000}
    shown = set(re.findall(r"\]\(figures/([^)]+)\)", (DOCS / "how_it_works.md").read_text()))
    committed = {path.name for path in (DOCS / "figures").glob("*.*g")}
    assert made == shown == committed


@pytest.mark.full
def test_layout_and_steps_are_those_of_the_text(make):
    names = make.sequence()
    assert names[:6] == ["class", "$z_{1}$", "$z_{2}$", "$z_{3}$", "$z_{4}$", "$s_{1}$"]
    assert names[-1] == "$z_{8}$"
    assert make.sampling_steps() == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 4)]


def test_encoder_mask_hides_queries_from_patches(make):
    mask = make.encoder_mask(4)
    assert mask[:4, :4].all() and not mask[:4, 4:].any() and mask[4:, :4].all()
    assert np.array_equal(mask[4:8, 4:8], np.tri(4, dtype=bool))
    assert mask[8:12, 4:12].all() and not mask[8:12, 12:].any()
