"""Flow matching: grids of times, their embedding, and solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.ops import flow


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
