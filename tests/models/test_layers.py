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
    """(latents of (params, config), params in the scanned layout, config)."""
    images = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)

    def latents(model):
        return model.first_pass(model.encode_patches(images))

    init = jax.eval_shape(Tokenizer(TOKENIZER).init, jax.random.key(0), images)
    apply = lambda params, c: Tokenizer(c).apply({"params": params}, method=latents)  # noqa: E731
    return apply, random_like(init), TOKENIZER


@pytest.fixture(scope="module")
def gen():
    """(logits of (params, config), params in the scanned layout, config)."""
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 12, (2, 8)), jnp.int32)
    labels = jnp.array([0, 3])
    init = jax.eval_shape(generator.Generator(GENERATOR).init, jax.random.key(0), codes, labels)
    apply = lambda params, c: generator.Generator(c).apply({"params": params}, codes, labels)  # noqa: E731
    return apply, random_like(init), GENERATOR


@pytest.fixture(scope="module", params=["tokenizer", "gen"])
def network(request):
    return request.getfixturevalue(request.param)


def loss_of(network, **changes):
    """A scalar that depends on every output, under changed fields of the configuration."""
    config = dataclasses.replace(network[2], **changes)
    return lambda params: jnp.mean(jnp.sin(3 * network[0](params, config)))


def assert_equal(got, want):
    """Two trees, against the largest entry of all."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want))
    assert scale > 1e-3
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_unrolled_equals_scanned(network):
    apply, params, config = network
    scanned = jax.jit(lambda params: apply(params, config))(params)
    config = dataclasses.replace(config, scan=False)
    unrolled = jax.jit(lambda params: apply(params, config))(layers.unstack_layers(params))
    assert scanned.std() > 0.1
    assert_equal(unrolled, scanned)


@pytest.fixture(scope="module")
def gradients(gen):
    return jax.jit(jax.grad(loss_of(gen)))(gen[1])


def test_unrolled_gives_the_same_gradients(gen, gradients):
    params = layers.unstack_layers(gen[1])
    unrolled = jax.jit(jax.grad(loss_of(gen, scan=False)))(params)
    assert_equal(layers.stack_layers(unrolled), gradients)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_gives_the_same_gradients(gen, gradients, remat):
    assert_equal(jax.jit(jax.grad(loss_of(gen, remat=remat)))(gen[1]), gradients)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_remat_computes_again(network, scan):
    """The less is kept for the backward pass, the more products are computed in it."""
    params = network[1] if scan else layers.unstack_layers(network[1])

    def products(remat):
        program = jax.make_jaxpr(jax.grad(loss_of(network, remat=remat, scan=scan)))(params)
        return str(program).count("dot_general")

    assert products("none") < products("dots") < products("full")


def test_stacking_round_trip(network):
    params = network[1]
    unrolled = layers.unstack_layers(params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(unrolled)]
    names = {part.key for path in paths for part in path}
    assert {"layers_0", "layers_1"} <= names and "layers" not in names
    back = layers.stack_layers(unrolled)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    # Either function leaves the layout that it makes as it is.
    assert jax.tree.structure(layers.stack_layers(params)) == jax.tree.structure(params)
    assert jax.tree.structure(layers.unstack_layers(unrolled)) == jax.tree.structure(unrolled)
