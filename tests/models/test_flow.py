"""Flow matching, scales, the flow head on its own, and sampling of FlowAR."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_files
from detailflow_jax.models import flow_sampler, layers
from detailflow_jax.models.flow_head import INJECTIONS, FlowHead, FlowHeadConfig
from detailflow_jax.models.flowar import FlowAR, FlowARConfig, example
from detailflow_jax.ops import flow, rotary
from detailflow_jax.ops import scales as grids
from detailflow_jax.tasks import flowar as task

pytestmark = pytest.mark.usefixtures("hasty_compiler")

TINY = FlowARConfig(
    width=16, first_depth=1, second_depth=1, num_heads=2, scales=(1, 2, 3), channels=3,
    num_classes=4, head_width=16, head_depth=1, head_dim=8, scan=False,
)  # fmt: skip


def random_like(tree, seed=0):
    """Parameters of random bits: those of a new head are zero where it matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), tree)


def network(config):
    model = FlowAR(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *example(config))["params"]
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    abstract = jax.tree.map(lambda x: x.value if is_box(x) else x, abstract, is_leaf=is_box)
    return model, random_like(abstract)


# ----------------------------------------------------------------------------------------- scales

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


# ------------------------------------------------------------------------------ times and solvers


def test_time_grids():
    assert len(flow.published_times(25)) == len(flow.published_times(24)) == 25
    np.testing.assert_allclose(flow.published_times(25)[:2], [1.0, 1 - 0.7 / 11])
    np.testing.assert_array_equal(flow.published_times(50), np.linspace(1, 0, 51))
    assert flow.sde_times(5)[-2:].tolist() == [0.04, 0.0]
    for grid in flow.GRIDS.values():
        times = grid(7)
        assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    assert flow.annealed_steps(25, 15, 5) == (25, 22, 20, 18, 15)
    with pytest.raises(ValueError, match="num_steps=1"):
        flow.published_times(1)


def test_time_embedding_floors_a_float32_product():
    times = np.linspace(1, 0, 51)
    levels = np.floor(np.float32(1000) * times.astype(np.float32))
    assert (levels != np.floor(1000 * times)).sum() > 5  # float64 would be another embedding
    got = flow.time_features(jnp.asarray(times, jnp.float32), 4)
    np.testing.assert_allclose(got[:, 0], np.cos(levels.astype(np.float64)), atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_with_their_order(solver, order):
    """dx/dt = x from t = 1 to 0 shrinks x by e."""

    def error(steps):
        x = jnp.ones(())
        for i in range(steps):
            step = jax.tree.map(lambda a: a[0], flow.steps(flow.uniform_times(steps), i, i + 1))
            x = flow.SOLVERS[solver](lambda x, t: x, x, step)
        return abs(float(x) - np.exp(-1))

    assert error(8) / error(16) == pytest.approx(2**order, rel=0.15)


def test_the_sde_keeps_the_marginals():
    """For Gaussian data of std s, the exact velocity is known; the SDE must end at std s."""
    s, count = 0.5, 20_000

    def velocity(x, t):
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (count,))
    times = flow.sde_times(200)
    for i in range(200):
        step = jax.tree.map(lambda a: a[0], flow.steps(times, i, i + 1))
        noise = jax.random.normal(jax.random.fold_in(key, i), (count,))
        x = flow.euler_maruyama_step(velocity, x, step, noise)
    assert float(jnp.std(x)) == pytest.approx(s, rel=0.05)


# --------------------------------------------------------------------------------------- the head


def head(injection, **fields):
    config = FlowHeadConfig(
        width=32, depth=2, channels=3, injection=injection, head_dim=16, scan=False, **fields
    )
    model = FlowHead(config)
    x, time, condition = jnp.zeros((1, 4, 3)), jnp.zeros(1), jnp.zeros((1, 4, 8))
    params = model.init(jax.random.key(0), x, time, condition)["params"]
    return model, {"params": random_like(params, seed=1)}


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


@pytest.mark.parametrize("injection", INJECTIONS)
def test_segments_are_as_separate_calls(injection):
    model, variables = head(injection)
    rng = np.random.default_rng(0)
    x, condition = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 5, 8))
    time = rng.random((2, 5))
    time[:, 1:] = time[:, 1:2]
    rope = grids.rotary_table((1, 2), 16)
    segments = grids.scale_index((1, 2))
    together = model.apply(variables, x, time, condition, rope=rope, segments=segments)
    for part in (slice(0, 1), slice(1, 5)):
        alone = model.apply(
            variables, x[:, part], time[:, part], condition[:, part], rope=rope[part]
        )
        np.testing.assert_allclose(together[:, part], alone, atol=1e-5)


def test_one_condition_for_all_positions_and_what_the_head_refuses():
    model, variables = head("spatial")
    x, time = jnp.ones((2, 4, 3)), jnp.ones(2)
    one = jnp.ones((2, 1, 8))
    same = model.apply(variables, x, time, jnp.tile(one, (1, 4, 1)))
    np.testing.assert_allclose(model.apply(variables, x, time, one), same, atol=1e-6)
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
    params = model.init(jax.random.key(0), x, jnp.ones(1), jnp.ones((1, 4, 8)))
    assert not model.apply(params, x, jnp.ones(1), jnp.ones((1, 4, 8))).any()


# --------------------------------------------------------------------------------------- sampling


def sampled(config, params, labels, indices, cfg_scale=3.0, noise=None, **fields):
    steps = fields.pop("num_steps", 4)
    times = flow_sampler.flow_times(len(config.scales), steps, fields.pop("grid", "published"))
    options = flow_sampler.FlowSamplingOptions(times, guided=cfg_scale != 1, **fields)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.asarray(indices))
    factors = flow_sampler.guidance_factors(cfg_scale, len(config.scales))
    return flow_sampler.sample(
        FlowAR(config), params, jnp.asarray(labels), keys, factors, noise, options=options
    )


def test_a_sample_does_not_depend_on_its_neighbours():
    _, params = network(TINY)
    both = sampled(TINY, params, [1, 3], [0, 1], guidance_high=0.9)
    alone = sampled(TINY, params, [3], [1], guidance_high=0.9)
    assert golden_files.error(both[1:], alone) < 5e-5
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_scanned_layers_and_a_buffer_give_samples_too():
    buffered = dataclasses.replace(TINY, buffer_size=3)
    _, params = network(buffered)
    unrolled = sampled(buffered, params, [1, 3], [0, 1])
    scanned = dataclasses.replace(buffered, scan=True)
    again = sampled(scanned, layers.stack_layers(params), [1, 3], [0, 1])
    assert golden_files.error(unrolled, again) < 5e-5
    _, plain = network(TINY)
    assert np.abs(unrolled - sampled(TINY, plain, [1, 3], [0, 1])).max() > 1e-3


def test_guidance_one_is_the_conditional_half_alone():
    _, params = network(TINY)
    alone = sampled(TINY, params, [1, 3], [0, 1], cfg_scale=1.0)
    guided = sampled(TINY, params, [1, 3], [0, 1], cfg_scale=1.0 + 1e-7)
    np.testing.assert_allclose(alone, guided, atol=1e-4)
    never = sampled(TINY, params, [1, 3], [0, 1], cfg_scale=5.0, guidance_high=0.0)
    assert golden_files.error(never, alone) < 5e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"num_steps": (6, 4, 2)},
        {"solver": "heun", "grid": "uniform"},
        {"solver": "euler_maruyama", "grid": "sde"},
        {"guidance_low": 0.2, "guidance_high": 0.6},
    ],
    ids=["annealed", "heun", "sde", "interval"],
)
def test_other_ways_to_sample_differ_and_are_finite(fields):
    _, params = network(TINY)
    base = sampled(TINY, params, [1, 3], [0, 1])
    other = sampled(TINY, params, [1, 3], [0, 1], **fields)
    assert np.isfinite(other).all() and np.abs(other - base).max() > 1e-4


def test_one_program_serves_every_guidance_scale():
    _, params = network(TINY)
    before = flow_sampler.sample._cache_size()
    for scale in (2.0, 3.0, 4.0):
        sampled(TINY, params, [0, 1, 2], [0, 1, 2], cfg_scale=scale, guidance_high=0.77)
    assert flow_sampler.sample._cache_size() == before + 1


DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import test_flow as t
from detailflow_jax.runtime import sharding
_, params = t.network(t.TINY)
labels, indices = np.arange(8, dtype=np.int32) % 4, np.arange(8)
one = t.sampled(t.TINY, params, labels, indices)
mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
split = NamedSharding(mesh, P(("data", "fsdp")))
with sharding.use(mesh):
    eight = t.sampled(t.TINY, params, jax.device_put(labels, split), jax.device_put(indices, split))
assert len(eight.sharding.device_set) == 8, eight.sharding
assert t.golden_files.error(eight, one) < 5e-5
"""


def test_samples_on_eight_devices_are_those_of_one():
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run(
        [sys.executable, "-c", DEVICES],
        check=True,
        env=env,
        cwd=os.path.dirname(__file__),
        timeout=300,
    )


# ------------------------------------------------------------------------------------ the losses


def test_weights_of_scales():
    np.testing.assert_allclose(task.scale_weights(TINY), np.square([1, 2, 3]) / 9)
    with pytest.raises(ValueError, match="2 values, expected one for each of the 3 scales"):
        task.scale_weights(TINY, (1.0, 2.0))


def test_dropout_acts_only_with_a_key():
    model, params = network(TINY)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    times, noise = task.draw(jax.random.key(0), TINY, 2)
    run = jax.jit(functools.partial(task.flow_losses, model))
    labels = jnp.array([0, 4])
    base, _ = run(params, latents, labels, times, noise)
    again, _ = run(params, latents, labels, times, noise)
    np.testing.assert_array_equal(base, again)
    dropped, _ = run(params, latents, labels, times, noise, jax.random.key(1))
    assert np.abs(dropped - base).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scales": (2, 1)}, "no scale schedule"),
        ({"num_heads": 3}, "no multiple of 4 x num_heads"),
        ({"head_width": 20}, "no multiple of head_dim"),
    ],
)
def test_configurations_that_cannot_be(fields, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(TINY, **fields)
