"""Noise prediction on the cosine schedule, and its samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.ops import diffusion, flow


def test_the_signal_falls_from_one_to_its_bound():
    share = diffusion.signal(np.linspace(0, 1, 1001))
    assert share[0] == 1.0 and share[-1] == np.float32(diffusion.LEAST_SIGNAL)
    assert np.all(np.diff(share) <= 0)


def test_data_is_had_back_from_the_true_noise_at_every_time():
    rng = np.random.default_rng(0)
    data, noise = rng.standard_normal((2, 11, 5)).astype(np.float32)
    time = np.linspace(0, 1, 11)[:, None]
    noisy = diffusion.interpolate(data, noise, time)
    np.testing.assert_allclose(diffusion.predicted_data(noisy, noise, time), data, atol=1e-5)


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_solvers_sample_a_gaussian_whose_noise_is_known(solver):
    """of data N(1, 0.5^2) the expected noise is known, so samples must have its mean and spread."""
    mean, spread = 1.0, 0.5

    def predict(x, time):
        share = diffusion.signal(time)
        variance = share * spread**2 + 1 - share
        return (x - jnp.sqrt(share) * mean) * jnp.sqrt(1 - share) / variance

    def advance(x, given):
        step, key = given
        noise = jax.random.normal(key, x.shape)
        return diffusion.SOLVERS[solver](predict, x, step, noise), None

    count = 200
    steps = jax.tree.map(jnp.asarray, flow.steps(flow.uniform_times(count), 0, count))
    first, *keys = jax.random.split(jax.random.key(0), count + 1)
    x, _ = jax.lax.scan(advance, jax.random.normal(first, (20_000,)), (steps, jnp.stack(keys)))
    assert np.mean(x) == pytest.approx(mean, abs=0.03)
    assert np.std(x) == pytest.approx(spread, abs=0.02)
