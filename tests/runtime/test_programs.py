"""Compiled steps, made ahead of their time."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.distributed import COMPILER
from detailflow_jax.runtime.programs import Programs

SIZES = [4, 2, 4, 3, 2, 1]


def plan(step):
    return SIZES[step], {"size": np.int32(SIZES[step])}


class Traced:
    """A step that waits for `go` while it is traced, and remembers the order of its variants."""

    def __init__(self):
        self.order, self.go = [], threading.Semaphore(0)

    def __call__(self, state, batch, arrays, *, variant):
        assert self.go.acquire(timeout=60)
        self.order.append(variant)
        if variant == 3:
            raise ValueError("3 is no size")
        return state + jnp.sum(batch[:variant]) * arrays["size"], {"loss": state}


@pytest.fixture
def step():
    return Traced()


def programs(step, total=6, **options):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = ConfigDict({"total_steps": total})
    jitted = jax.jit(step, static_argnames="variant", donate_argnums=0)
    return Programs(jitted, plan, mesh, config, **options)


def given():
    return jnp.float32(1), jnp.arange(4, dtype=jnp.float32)


def test_later_programs_are_made_in_the_order_of_their_steps(step):
    with programs(step, total=5) as made:
        first = made.ask(0, plan(0), *given())
        assert not first.done()
        for _ in range(4):
            step.go.release()
        out, _ = first.result(60).run(*given(), plan(0)[1])
        assert out == 1 + 6 * 4
        second = made.ask(1, plan(1), *given())
        assert second.result(60).run(*given(), plan(1)[1])[0] == 1 + 1 * 2
        assert made.ask(4, plan(4), *given()) is second
        with pytest.raises(ValueError, match="3 is no size"):
            made.ask(3, plan(3), *given()).result(60)
    assert step.order == [4, 2, 3]  # the size 1 comes after the last step


def test_what_has_not_begun_at_the_end_is_left(step):
    with programs(step) as made:
        first = made.ask(0, plan(0), *given())
    step.go.release()
    assert first.result(60).flops == 0
    for thread in threading.enumerate():
        if thread.name == COMPILER:
            thread.join(60)
    assert step.order == [4]


def test_only_the_asked_one_is_made_where_batches_differ(step):
    with programs(step, ahead=False) as made:
        step.go.release()
        made.ask(0, plan(0), *given()).result(60)
        assert step.order == [4]
        step.go.release()
        batch = jnp.arange(3, dtype=jnp.float32)
        assert (
            made.ask(1, plan(1), jnp.float32(0), batch)
            .result(60)
            .run(jnp.float32(0), batch, plan(1)[1])
        )
    assert step.order == [4, 2]
