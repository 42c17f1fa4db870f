"""Attention, and the stack of blocks in both layouts and under every remat policy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.models import generator, layers, siglip
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig

# -------------------------------------------------------------------------------------- attention


def plain_attention(query, key, value, mask):
    """One softmax a query and head, in float64; query head i reads key/value head i // (H/K)."""
    out = np.zeros(query.shape)
    batch, length, heads, head_dim = query.shape
    for b, t, i in np.ndindex(batch, length, heads):
        source = i // (heads // key.shape[2])
        scores = key[b, :, source] @ query[b, t, i] / np.sqrt(head_dim)
        weights = np.where(mask[b, t], np.exp(scores), 0)
        out[b, t, i] = weights @ value[b, :, source] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("prefix", [0, 5])
def test_attention_equals_its_definition(kv_heads, prefix):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 3, 4, 8))
    key, value = (rng.standard_normal((2, prefix + 3, kv_heads, 8)) for _ in "kv")
    mask = rng.random((2, 3, prefix + 3)) < 0.6
    mask[..., -1] = True
    cast = functools.partial(jnp.asarray, dtype=jnp.float32)
    got = layers.attend(
        cast(query),
        cast(key[:, prefix:]),
        cast(value[:, prefix:]),
        prefix=(cast(key[:, :prefix]), cast(value[:, :prefix])) if prefix else None,
        mask=jnp.asarray(mask[:, None]),
    )
    np.testing.assert_allclose(got, plain_attention(query, key, value, mask), atol=1e-5)


# ------------------------------------------------------------------------------------ both layouts

VIT = siglip.ViTConfig(width=16, depth=2, num_heads=2, mlp_dim=24, patch_size=4, table_side=4)
TOKENIZER = TokenizerConfig(
    image_size=16, num_tokens=8, group_size=2, codebook_size=12, encoder=VIT, decoder=VIT
)
GENERATOR = generator.GeneratorConfig(
    width=16,
    depth=2,
    num_heads=2,
    multiple_of=8,
    num_tokens=8,
    group_size=2,
    codebook_size=12,
    num_classes=3,
    residual_dropout=0.0,
    token_dropout=0.0,
)


def random_like(abstract):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, nn.unbox(abstract)["params"])


@pytest.fixture(scope="module")
def tokenizer():
    """(loss of (params, config), params in the scanned layout) of encoding."""
    images = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)

    def latents(model):
        return jnp.mean(jnp.sin(3 * model.first_pass(model.encode_patches(images))))

    init = jax.eval_shape(Tokenizer(TOKENIZER).init, jax.random.key(0), images)
    apply = lambda params, c: Tokenizer(c).apply({"params": params}, method=latents)  # noqa: E731
    return apply, random_like(init), TOKENIZER


@pytest.fixture(scope="module")
def gen():
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 12, (2, 8)), jnp.int32)
    labels = jnp.array([0, 3])
    init = jax.eval_shape(generator.Generator(GENERATOR).init, jax.random.key(0), codes, labels)

    def apply(params, c):
        logits = generator.Generator(c).apply({"params": params}, codes, labels)
        return jnp.mean(jnp.sin(logits))

    return apply, random_like(init), GENERATOR


@pytest.fixture(scope="module", params=["tokenizer", "gen"])
def network(request):
    return request.getfixturevalue(request.param)


def loss_and_gradients(network, params, **changes):
    apply, _, config = network
    config = dataclasses.replace(config, **changes)
    return jax.jit(jax.value_and_grad(lambda params: apply(params, config)))(params)


@pytest.fixture(scope="module")
def scanned(network):
    return loss_and_gradients(network, network[1])


def assert_equal(got, want):
    assert float(got[0]) == pytest.approx(float(want[0]), abs=1e-6)
    assert jax.tree.structure(got[1]) == jax.tree.structure(want[1])
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want[1]))
    assert scale > 1e-3
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_unrolled_equals_scanned(network, scanned):
    loss, gradients = loss_and_gradients(network, layers.unstack_layers(network[1]), scan=False)
    assert_equal((loss, layers.stack_layers(gradients)), scanned)


def test_remat_gives_the_same_gradients(network, scanned):
    """`dots` on the generator only: on the tokenizer it would be one more slow compile."""
    for remat in ("full", "dots") if network[2] is GENERATOR else ("full",):
        assert_equal(loss_and_gradients(network, network[1], remat=remat), scanned)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_computes_again(gen, scan):
    """The less is kept for the backward pass, the more products are computed in it."""
    apply, params, config = gen
    params = params if scan else layers.unstack_layers(params)

    def products(remat):
        changed = dataclasses.replace(config, remat=remat, scan=scan)
        program = jax.make_jaxpr(jax.grad(lambda params: apply(params, changed)))(params)
        return str(program).count("dot_general")

    assert products("none") < products("dots") < products("full")


def test_stacking_round_trip(network):
    params = network[1]
    unrolled = layers.unstack_layers(params)
    names = {
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(unrolled)
    }
    assert any("layers_1" in name for name in names) and not any("'layers'" in n for n in names)
    back = layers.stack_layers(unrolled)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    # Either function leaves the layout that it makes as it is.
    assert jax.tree.structure(layers.stack_layers(params)) == jax.tree.structure(params)
    assert jax.tree.structure(layers.unstack_layers(unrolled)) == jax.tree.structure(unrolled)
