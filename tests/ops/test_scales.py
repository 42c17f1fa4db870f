"""Schedules of scales: their masks, pyramids and rotary tables."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detailflow_jax.ops import rotary
from detailflow_jax.ops import scales as grids

schedules = st.sets(st.integers(1, 12), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))


@given(schedules)
@settings(max_examples=25, deadline=None)
def test_every_increasing_schedule_is_a_schedule(scales):
    grids.check_scales(scales)
    index, mask = grids.scale_index(scales), grids.scale_mask(scales)
    assert len(index) == grids.offsets(scales)[-1] == sum(s * s for s in scales)
    for k, (start, stop) in enumerate(
        zip(grids.offsets(scales), grids.offsets(scales)[1:], strict=False)
    ):
        assert (index[start:stop] == k).all()
        assert mask[start:stop, :stop].all() and not mask[start:stop, stop:].any()


@pytest.mark.parametrize("scales", [(), (2, 2), (4, 2), (0, 1), (1, 2.5)])
def test_what_is_no_schedule_is_refused(scales):
    with pytest.raises(ValueError, match="no scale schedule"):
        grids.check_scales(scales)


def test_inputs_and_targets_are_those_of_two_interpolations():
    latents = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
    targets, inputs = grids.pyramid(jnp.asarray(latents), (1, 2, 3, 6))
    x = torch.from_numpy(latents).permute(0, 3, 1, 2)
    wanted, wanted_inputs = [], []
    for side, after in ((1, 2), (2, 3), (3, 6), (6, None)):
        low = torch.nn.functional.adaptive_avg_pool2d(x, side)
        wanted.append(low.flatten(2).transpose(1, 2))
        if after:
            up = torch.nn.functional.interpolate(low, (6, 6), mode="bicubic", align_corners=False)
            down = torch.nn.functional.adaptive_avg_pool2d(up, after)
            wanted_inputs.append(down.flatten(2).transpose(1, 2))
    np.testing.assert_allclose(targets, torch.cat(wanted, 1), atol=1e-5)
    np.testing.assert_allclose(inputs, torch.cat(wanted_inputs, 1), atol=1e-5)


def test_latents_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 3\).*last of the scales"):
        grids.pyramid(jnp.zeros((2, 8, 8, 3)), (1, 2, 4))


def test_a_stretched_grid_covers_the_finest_one():
    small, large = rotary.grid_rotary_table(2, 4.0, 8), rotary.grid_rotary_table(8, 1.0, 8)
    np.testing.assert_array_equal(small.reshape(2, 2, 4, 2)[1, 1], large.reshape(8, 8, 4, 2)[4, 4])
