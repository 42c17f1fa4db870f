"""Reads `tests/golden/` and holds results against it."""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "arrays"
TOKENIZER = GENERATOR = FLOWAR = 5 * 2e-6
VELOCITY = 5 * 1e-5
VAE = SAMPLED = 5 * 5e-5
"""Five times the published tolerances: max difference over max magnitude."""


def read(name):
    """(arrays, settings, state dict) of one golden file."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    settings = json.loads((FOLDER / f"{name}.json").read_text())
    state_dict = {k[3:]: v for k, v in arrays.items() if k.startswith("sd/")}
    return arrays, settings, state_dict


def error(got, want):
    """Max difference over max magnitude."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30))


def nhwc(images):
    """Float NCHW golden images as NHWC."""
    return np.moveaxis(np.asarray(images), 1, -1)
