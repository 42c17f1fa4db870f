"""The flow head on its own, and sampling and losses of FlowAR."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import children
import golden_files
from detailflow_jax.models import flow_sampler, layers
from detailflow_jax.models.flow_head import INJECTIONS, FlowHead, FlowHeadConfig
from detailflow_jax.ops import rotary
from detailflow_jax.ops import scales as grids
from detailflow_jax.tasks import flowar as task
from tiny_flowar import TINY, network, random_like, sampled

# --------------------------------------------------------------------------------------- the head


def head(injection, **fields):
    config = FlowHeadConfig(
        width=32, depth=2, channels=3, injection=injection, head_dim=16, scan=False, **fields
    )
    model = FlowHead(config)
    x, time, condition = jnp.zeros((1, 4, 3)), jnp.zeros(1), jnp.zeros((1, 4, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x, time, condition)["params"]
    return model, {"params": random_like(params, seed=1)}


@pytest.mark.slow
@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_injection_uses_the_condition(injection):
    model, variables = head(injection)
    rng = np.random.default_rng(0)
    x, condition = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 8))
    rope = rotary.grid_rotary_table(2, 1.0, 16)
    apply = jax.jit(functools.partial(model.apply, variables, rope=rope))
    time = jnp.array([0.3, 0.9])
    base = apply(x, time, condition)
    assert base.shape == (2, 4, 3) and base.dtype == jnp.float32
    moved = apply(x, time, np.concatenate([condition[:, :1] + 1, condition[:, 1:]], axis=1))
    change = jnp.abs(moved - base).max((0, 2))
    assert (change > 1e-5).all()  # position 0's condition reaches every position
    assert jnp.abs(apply(x, time + 0.05, condition) - base).max() > 1e-5


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("injection", INJECTIONS)
def test_segments_are_as_separate_calls(injection):
    model, variables = head(injection)
    rng = np.random.default_rng(0)
    x, condition = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 5, 8))
    time = rng.random((2, 5))
    time[:, 1:] = time[:, 1:2]
    rope = grids.rotary_table((1, 2), 16)
    segments = grids.scale_index((1, 2))
    apply = jax.jit(model.apply)
    together = jax.jit(functools.partial(model.apply, segments=segments))(
        variables, x, time, condition, rope=rope
    )
    for part in (slice(0, 1), slice(1, 5)):
        alone = apply(variables, x[:, part], time[:, part], condition[:, part], rope=rope[part])
        np.testing.assert_allclose(together[:, part], alone, atol=1e-5)


def test_one_condition_for_all_positions_and_what_the_head_refuses():
    model, variables = head("spatial")
    x, time = jnp.ones((2, 4, 3)), jnp.ones(2)
    one = jnp.ones((2, 1, 8))
    apply = jax.jit(model.apply)
    same = apply(variables, x, time, jnp.tile(one, (1, 4, 1)))
    np.testing.assert_allclose(apply(variables, x, time, one), same, atol=1e-6)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 2\), expected \[B, T, 3\]"):
        model.apply(variables, x[..., :2], time, one)
    with pytest.raises(ValueError, match="condition has shape"):
        model.apply(variables, x, time, jnp.ones((2, 3, 8)))
    with pytest.raises(ValueError, match="time has shape"):
        model.apply(variables, x, jnp.ones(3), one)
    with pytest.raises(ValueError, match="injection='film'"):
        FlowHeadConfig(injection="film")


def test_a_new_head_starts_from_zero_velocity():
    model = FlowHead(FlowHeadConfig(width=64, depth=1, channels=3))
    x = jnp.ones((1, 4, 3))
    arguments = x, jnp.ones(1), jnp.ones((1, 4, 8))
    params = jax.jit(model.init)(jax.random.key(0), *arguments)
    assert not jax.jit(model.apply)(params, *arguments).any()


# --------------------------------------------------------------------------------------- sampling


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_neighbours():
    _, params = network(TINY)
    both = sampled(TINY, params, [1, 3], [0, 1], guidance_high=0.9)
    alone = sampled(TINY, params, [3], [1], guidance_high=0.9)
    assert golden_files.error(both[1:], alone) < 5e-5
    assert np.abs(both[0] - both[1]).max() > 1e-3


@pytest.mark.slow
def test_scanned_layers_and_a_buffer_give_samples_too():
    buffered = dataclasses.replace(TINY, buffer_size=3)
    _, params = network(buffered)
    unrolled = sampled(buffered, params, [1, 3], [0, 1])
    scanned = dataclasses.replace(buffered, scan=True)
    again = sampled(scanned, layers.stack_layers(params), [1, 3], [0, 1])
    assert golden_files.error(unrolled, again) < 5e-5
    _, plain = network(TINY)
    assert np.abs(unrolled - sampled(TINY, plain, [1, 3], [0, 1])).max() > 1e-3


@pytest.mark.slow
def test_guidance_one_is_the_conditional_half_alone():
    _, params = network(TINY)
    alone = sampled(TINY, params, [1, 3], [0, 1], cfg_scale=1.0)
    guided = sampled(TINY, params, [1, 3], [0, 1], cfg_scale=1.0 + 1e-7)
    np.testing.assert_allclose(alone, guided, atol=1e-4)
    never = sampled(TINY, params, [1, 3], [0, 1], cfg_scale=5.0, guidance_high=0.0)
    assert golden_files.error(never, alone) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"num_steps": (6, 3)}, id="annealed", marks=pytest.mark.full),
        pytest.param({"solver": "heun", "grid": "uniform"}, id="heun"),
        pytest.param({"solver": "euler_maruyama", "grid": "sde"}, id="sde", marks=pytest.mark.full),
        pytest.param(
            {"guidance_low": 0.2, "guidance_high": 0.6}, id="interval", marks=pytest.mark.full
        ),
    ],
)
def test_other_ways_to_sample_differ_and_are_finite(fields):
    _, params = network(TINY)
    base = sampled(TINY, params, [1, 3], [0, 1])
    other = sampled(TINY, params, [1, 3], [0, 1], **fields)
    assert np.isfinite(other).all() and np.abs(other - base).max() > 1e-4


@pytest.mark.slow
def test_a_model_that_predicts_noise_is_sampled_by_its_own_solvers():
    model, params = network(dataclasses.replace(TINY, objective="diffusion"))
    fields = {"num_steps": 4, "grid": "uniform"}
    first, second = (
        sampled(model.config, params, [1, 3], [0, 1], solver=solver, **fields)
        for solver in ("ddim", "ddpm")
    )
    assert np.isfinite(first).all() and np.isfinite(second).all()
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
def test_one_program_serves_every_guidance_scale():
    _, params = network(TINY)
    before = flow_sampler.sample._cache_size()
    for scale in (2.0, 3.0, 4.0):
        sampled(TINY, params, [0, 1, 2], [0, 1, 2], cfg_scale=scale, guidance_high=0.77)
    assert flow_sampler.sample._cache_size() == before + 1


DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import golden_files, tiny_flowar as t
from detailflow_jax.runtime import sharding
_, params = t.network(t.TINY)
labels, indices = np.arange(8, dtype=np.int32) % 4, np.arange(8)
one = t.sampled(t.TINY, params, labels, indices)
mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
split = NamedSharding(mesh, P(("data", "fsdp")))
with sharding.use(mesh):
    eight = t.sampled(t.TINY, params, jax.device_put(labels, split), jax.device_put(indices, split))
assert len(eight.sharding.device_set) == 8, eight.sharding
assert golden_files.error(eight, one) < 5e-5
"""


@pytest.mark.full
@pytest.mark.slow
def test_samples_on_eight_devices_are_those_of_one():
    children.run_on_eight_devices("-c", DEVICES)


# ------------------------------------------------------------------------------------ the losses


def test_weights_of_scales():
    np.testing.assert_allclose(task.scale_weights(TINY), np.square([1, 3]) / 9)
    with pytest.raises(ValueError, match="3 values, expected one for each of the 2 scales"):
        task.scale_weights(TINY, (1.0, 2.0, 3.0))


def test_dropout_acts_only_with_a_key():
    model, params = network(TINY)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    times, noise = task.draw(jax.random.key(0), TINY, 2)
    run = jax.jit(functools.partial(task.flow_losses, model))
    labels = jnp.array([0, 4])
    pyramid = grids.pyramid(latents, TINY.scales)
    base, _ = run(params, pyramid, labels, times, noise)
    again, _ = run(params, pyramid, labels, times, noise)
    np.testing.assert_array_equal(base, again)
    dropped, _ = run(params, pyramid, labels, times, noise, jax.random.key(1))
    assert np.abs(dropped - base).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scales": (2, 1)}, "no scale schedule"),
        ({"num_heads": 3}, "no multiple of 4 x num_heads"),
        ({"head_width": 20}, "no multiple of head_dim"),
        ({"objective": "noise"}, "objective='noise' is not one of flow, diffusion"),
    ],
)
def test_configurations_that_cannot_be(fields, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(TINY, **fields)
