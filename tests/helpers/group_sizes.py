"""Sizes of sequences that are cut into groups, as hypothesis draws them."""

from hypothesis import strategies as st


@st.composite
def groups(draw, most=12):
    """(N, g, c) that belong together."""
    size, count = draw(st.integers(1, 6)), draw(st.integers(1, most))
    return size * count, size, size * draw(st.integers(0, count))
