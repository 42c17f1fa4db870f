"""The predecessors that the benchmark compares with: their sizes, and that they sample."""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import baselines
import measuring
import rival_llamagen
import rival_titok
import rival_var

from detailflow_jax.models import layers


def millions(module):
    """{network: parameters in millions}."""
    found = {}
    for name, network, arguments, method in module.networks("float32"):
        init = baselines.with_method(network, method)
        shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *arguments))
        found[name] = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    return found


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        # of the papers' tables and the published checkpoints
        (rival_var, {"generator": 310}),
        (rival_titok, {"generator": 177}),
        (rival_llamagen, {"generator": 343}),
    ],
)
def test_generators_have_the_published_sizes(module, expected):
    found = millions(module)
    assert {name: round(found[name]) for name in expected} == expected


def tiny(network, labels, keys, method, *arguments):
    """What two samples are, and the parameters."""
    params = measuring.random_params(baselines.with_method(network, method), *arguments)
    params = jax.tree.map(lambda x: 10 * jnp.asarray(x), params)
    run = jax.jit(lambda params: layers.apply(network, params, labels, keys, 2.0, method="sample"))
    return run(params), params


def test_var_with_a_cache_is_var_without_one():
    config = rival_var.VARConfig(depth=1, sides=(1, 2, 3), codes=8, code_dim=2, num_classes=3)
    network, labels = rival_var.VAR(config), jnp.array([0, 2])
    keys = jax.random.split(jax.random.key(0), 2)
    latent, params = tiny(network, labels, keys, "parts", labels)
    assert latent.shape == (2, 3, 3, 2) and np.isfinite(latent).all()

    def logits_of_all_scales(module):
        """Scale by scale with a cache, and in one pass under the mask by scale."""
        condition, cache, rows, found = module.classes[labels], None, [], []
        for scale, side in enumerate(config.sides):
            x = module.next_inputs(latent, scale) + 0.1 * scale
            rows.append(x + module.levels[scale])
            logits, cache = module.run(x, condition, scale, cache)
            assert logits.shape == (2, side * side, 8)
            found.append(logits)
        mask = rival_var.grids.scale_mask(config.sides)
        x = jnp.concatenate(rows, axis=1) + module.positions
        x, _ = module.blocks(x, mask=mask, context=(condition,))
        shift, factor = jnp.split(module.modulation(nn.silu(condition))[:, None], 2, axis=-1)
        whole = module.head(rival_var._norm(x) * (1 + factor) + shift)
        return jnp.concatenate(found, axis=1), whole

    run = jax.jit(lambda params: layers.apply(network, params, method=logits_of_all_scales))
    cached, whole = run(params)
    np.testing.assert_allclose(cached, whole, atol=1e-4)
    assert np.std(whole) > 1e-2


def test_titok_unmasks_every_token():
    config = rival_titok.TiTokConfig(codes=16, num_classes=3, depth=1, width=16, heads=2)
    labels, keys = jnp.array([0, 2]), jax.random.split(jax.random.key(0), 2)
    arguments = jnp.zeros((1, 32), jnp.int32), labels[:1]
    codes, _ = tiny(rival_titok.Generator(config), labels, keys, "logits", *arguments)
    assert codes.shape == (2, 32) and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() < 16


def test_the_table_names_every_figure():
    row = {"title": "X", "tokens": 4, "steps": 2, "generator": 3e6, "decoder": 1e6, "flops": 2e12}
    heading, figures = baselines.rows([row | {"s/image, batch 1": 0.1234}])
    assert heading == ("", "tokens", "steps", "parameters (M)", "TFLOP", "s/image, batch 1")
    assert figures == ("X", "4", "2", "3 + 1", "2.00", "0.123")


@pytest.mark.parametrize(
    ("option", "text"),
    [("--systems=gan", "['gan'] are not among llamagen"), ("--batch=0", "must be at least 1")],
)
def test_senseless_options_are_refused(option, text, capsys):
    with pytest.raises(SystemExit):
        baselines.parse([option])
    assert text in capsys.readouterr().err
