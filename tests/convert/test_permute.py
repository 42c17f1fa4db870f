"""Axes in another order than published: convolutions, alone, stacked by layer and fused."""

import jax
import numpy as np
import pytest
import torch

from detailflow_jax.convert import CheckpointError, mapping
from detailflow_jax.convert.mapping import Entry

RNG = np.random.default_rng(0)
STATE = {
    "conv.weight": RNG.standard_normal((6, 4, 2, 3)).astype(np.float32),
    "conv.bias": RNG.standard_normal(6).astype(np.float32),
    "fused.0.weight": RNG.standard_normal((5, 3, 1, 2)).astype(np.float32),
    "fused.1.weight": RNG.standard_normal((5, 3, 1, 2)).astype(np.float32),
    "led": RNG.standard_normal((1, 2, 3, 4)).astype(np.float32),
}
TABLE = (
    *mapping.conv("conv", "conv"),
    Entry("fused.{}.weight", ("layers/a", "layers/b"), permute=(2, 3, 1, 0)),
    Entry("led", ("led",), lead=1, permute=(2, 0, 1)),
)
SHAPES = {
    "conv": {"kernel": (2, 3, 4, 6), "bias": (6,)},
    "layers": {"a": (2, 1, 2, 3, 2), "b": (2, 1, 2, 3, 3)},
    "led": (4, 2, 3),
}


def abstract(shapes):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=is_shape)


def test_permuted_axes_both_ways():
    params, report = mapping.from_published(TABLE, STATE, abstract(SHAPES))
    assert not report.missing and not report.unused
    np.testing.assert_array_equal(params["led"], STATE["led"][0].transpose(2, 0, 1))
    fused = STATE["fused.1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["layers"]["a"][1], fused[..., :2])
    np.testing.assert_array_equal(params["layers"]["b"][1], fused[..., 2:])
    assert mapping.published_shapes(TABLE, abstract(SHAPES)) == {
        k: x.shape for k, x in STATE.items()
    }
    back = mapping.to_published(TABLE, params)
    assert back.keys() == STATE.keys()
    for name, x in STATE.items():
        np.testing.assert_array_equal(back[name], x)


def test_a_converted_convolution_is_the_same_function():
    params, _ = mapping.from_published(TABLE, STATE, abstract(SHAPES))
    x = RNG.standard_normal((2, 4, 7, 8)).astype(np.float32)
    want = torch.nn.functional.conv2d(*(torch.from_numpy(v) for v in (x, STATE["conv.weight"])))
    got = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1),
        params["conv"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(np.moveaxis(got, 3, 1), want.numpy(), rtol=0, atol=1e-5)


def test_a_convolution_of_another_size_is_refused():
    state = STATE | {"conv.weight": STATE["conv.weight"].transpose(0, 1, 3, 2)}
    with pytest.raises(CheckpointError, match=r"'conv\.weight' has shape \(6, 4, 3, 2\)"):
        mapping.from_published(TABLE, state, abstract(SHAPES))


def test_an_order_that_is_none_is_refused():
    for options in ({"permute": (0, 0, 1)}, {"permute": (1, 0), "transpose": True}):
        with pytest.raises(ValueError, match="expected an order of all the axes"):
            Entry("x", ("x",), **options)
