"""Settings of FlowAR's samples that are refused."""

import numpy as np
import pytest

import scored_models


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale=0.5, expected >= 1"),
        ({"num_steps": [4, 4, 4]}, "3 counts, expected 2, one per scale"),
        ({"solver": "rk4"}, "solver='rk4' is not one of"),
        ({"solver": "ddim"}, "'ddim' is not one of .* sample a model of objective 'flow'"),
        ({"guidance_high": 2.0}, "0 <= low <= high <= 1"),
        ({"guidance_high": float("nan")}, "guidance_high=nan, expected a finite number"),
        ({"guidance_low": "0"}, "guidance_low='0', expected a finite number"),
        ({"num_steps": 2.5}, "num_steps=2.5, expected a whole number"),
        ({"num_steps": [4, "4"]}, "num_steps='4', expected a whole number"),
        ({"num_steps": "44"}, "num_steps='44', expected a whole number"),
        ({"seed": -1}, "seed=-1, expected a whole number from 0"),
        ({"grid": "cosine"}, "grid='cosine' is not one of"),
        ({"noise": [np.zeros((1, 1, 3))]}, "noise has shapes"),
        ({"noise": "x"}, "noise cannot become an array"),
        ({"labels": [3]}, r"labels \[3\] are out of range, expected 0..2"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, text, unchecked):
    with pytest.raises(ValueError, match=text):
        scored_models.flowar().sample(**({"labels": [1]} | change))
