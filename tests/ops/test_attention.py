"""Attention by fused kernels against plain operations, and which of them is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from detailflow_jax.ops import attention

BATCH, LENGTH, HEADS, WIDTH = 2, 130, 2, 16  # padded to 256


def arrays(dtype=jnp.float32, length=LENGTH):
    rng = np.random.default_rng(0)
    shape = (3, BATCH, length, HEADS, WIDTH)
    return list(jnp.asarray(2 * rng.standard_normal(shape), dtype))


def masks():
    """None, one that is known when tracing, and one of keys that is data."""
    scale = np.searchsorted([1, 5, 21, 85], np.arange(LENGTH), side="right")
    shown = np.arange(LENGTH) < np.array([[7], [LENGTH]])
    known = attention.StaticMask(scale[:, None] >= scale[None])
    return {"none": None, "known": known, "keys": jnp.asarray(shown[:, None, None])}


def value_and_gradients(attend, mask, inputs):
    def mean(*inputs):
        out = attend(*inputs, mask=mask).astype(jnp.float32)
        return jnp.mean(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), grads = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [out, *grads]


def splash(*inputs, mask):
    return attention.splash(*inputs, mask, interpret=True)


@pytest.mark.parametrize("kind", ["none", "known", "keys"])
def test_splash_is_plain_attention_with_its_gradients(kind):
    mask, inputs = masks()[kind], arrays()
    expected = value_and_gradients(attention.plain, mask, inputs)
    found = value_and_gradients(splash, mask, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_in_bfloat16_splash_differs_by_two_roundings():
    """Of the weights and of the result, each 2^-8."""
    mask, inputs = masks()["known"], arrays(jnp.bfloat16)
    exact = value_and_gradients(attention.plain, mask, [x.astype(jnp.float32) for x in inputs])
    found = value_and_gradients(splash, mask, inputs)
    for ours, truth in zip(found, exact, strict=True):
        error = np.abs(np.asarray(ours, np.float32) - truth)
        assert error.max() <= 2**-7 * np.abs(truth).max()


QUERY = jax.ShapeDtypeStruct((8, 341, 16, 64), jnp.bfloat16)
SHORT = jax.ShapeDtypeStruct((8, 256, 16, 64), jnp.bfloat16)
FULL = jax.ShapeDtypeStruct((8, 341, 16, 64), jnp.float32)


@pytest.mark.parametrize(
    ("asked", "platform", "query", "bare", "expected"),
    [
        ("auto", "tpu", QUERY, True, "splash"),
        ("auto", "tpu", QUERY, False, "plain"),  # dropout, or a prefix
        ("auto", "tpu", SHORT, True, "plain"),
        ("splash", "tpu", SHORT, True, "splash"),
        ("auto", "tpu", FULL, True, "plain"),
        ("splash", "tpu", FULL, True, "splash"),
        ("plain", "tpu", QUERY, True, "plain"),
        ("auto", "gpu", QUERY, True, "cudnn"),
        ("cudnn", "gpu", FULL, True, "plain"),  # it has no float32
        ("auto", "gpu", QUERY, False, "plain"),
        ("auto", "cpu", QUERY, True, "plain"),
    ],
)
def test_the_kernel_is_chosen_by_platform_and_shape(asked, platform, query, bare, expected):
    assert attention.choose(asked, platform, query, query, None, bare=bare) == expected


def test_a_mask_that_splash_cannot_have_is_plain():
    mask = jnp.ones((8, 1, 341, 341), bool)
    assert attention.choose("auto", "tpu", QUERY, QUERY, mask, bare=True) == "plain"
    assert attention.choose("auto", "tpu", QUERY, QUERY, mask[:, :, :1], bare=True) == "splash"


def test_kernels_of_another_platform_are_refused():
    with pytest.raises(ValueError, match="attention='cudnn' is not for 'tpu': expected auto"):
        attention.choose("cudnn", "tpu", QUERY, QUERY, None, bare=True)
    with pytest.raises(ValueError, match="attention='flash' is not one of auto, plain"):
        attention.choose("flash", "tpu", QUERY, QUERY, None, bare=True)


def test_a_static_mask_is_known_in_scans_and_when_computing_again():
    mask = attention.static(np.tri(4, dtype=bool)[None, None])
    assert isinstance(mask, attention.StaticMask) and mask == attention.StaticMask(np.tri(4) > 0)
    assert hash(mask) == hash(attention.StaticMask(np.tri(4) > 0)) and not jax.tree.leaves(mask)

    @jax.checkpoint
    def body(x, mask):
        return x * mask.allowed.sum(), None  # A tracer has no numpy sum.

    total, _ = jax.lax.scan(lambda x, _: body(x, mask), jnp.ones(()), None, length=2)
    assert total == 100 and isinstance(mask.allowed, np.ndarray)


@pytest.mark.parametrize("kind", ["none", "known", "keys"])
def test_cudnn_takes_odd_lengths(kind, monkeypatch):
    """Traced only, where there is no GPU: JAX then checks the arrays against cuDNN's rules."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    length = 131
    inputs = [jnp.zeros((BATCH, length, HEADS, 64), jnp.bfloat16)] * 3
    mask = masks()[kind]
    if kind == "known":
        mask = attention.StaticMask(np.tri(length, dtype=bool))
    elif kind == "keys":
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)))

    def loss(*inputs):
        return attention.cudnn(*inputs, mask).astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(*inputs))
    assert "dot_product_attention_bwd" in text and "f32[2,2,132,13" not in text
