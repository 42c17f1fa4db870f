"""Editing, variations and upscaling measured on digits."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import editing


def test_reduced_images_are_area_averages_and_grow_back_to_their_size():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[:, :4], images[0, 4:] = 200, 100
    small = editing.reduced(images, 2)
    np.testing.assert_array_equal(small[0, :, 0, 0], [200, 100])
    np.testing.assert_array_equal(small[1, :, 1, 2], [200, 0])
    large = editing.bicubic(small, 8)
    assert large.shape == images.shape and large.dtype == np.uint8
    assert large[0, 0, 0, 0] > large[0, 7, 0, 0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--vae=runs/vae"], "--vae and --flowar go together"),
        (["--generator=runs/gen"], "--generator needs --tokenizer"),
        (["--count=3"], "at least 10"),
    ],
)
def test_senseless_options_are_refused(options, text, capsys):
    with pytest.raises(SystemExit):
        editing.parse(options)
    assert text in capsys.readouterr().err


def test_without_models_those_of_the_demo_are_measured():
    args = editing.parse([])
    assert (args.tokenizer, args.vae) == ("runs/demo/tokenizer", None)
    assert editing.parse(["--vae=a", "--flowar=b"]).tokenizer is None
