"""The mask of groups."""

import hypothesis
import pytest

from detailflow_jax.ops import masks
from group_sizes import groups

settings = hypothesis.settings(max_examples=50, deadline=None)


def may_see(row, column, group_size, causal_num):
    """The rule in words: one by one at first, then whole groups see themselves and the past."""
    if row < causal_num:
        return column <= row
    return column < (row // group_size + 1) * group_size


@settings
@hypothesis.given(groups())
def test_group_mask_follows_the_rule(sizes):
    num_tokens, group_size, causal_num = sizes
    mask = masks.group_mask(*sizes)
    assert mask.dtype == bool and mask.shape == (num_tokens, num_tokens)
    for row in range(num_tokens):
        want = [may_see(row, column, group_size, causal_num) for column in range(num_tokens)]
        assert mask[row].tolist() == want


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((10, 4, 4), "num_tokens=10"),
        ((8, 0, 4), "group_size=0"),
        ((8, 4, 6), "causal_num=6"),
        ((8, 4, 12), "causal_num=12"),
        ((8, 4, -4), "causal_num=-4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        masks.group_mask(*sizes)
