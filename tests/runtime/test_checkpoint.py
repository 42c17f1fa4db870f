"""Checkpoints: what is saved comes back, what is damaged is passed over, what fails says so."""

import json
import pathlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from flax import struct

from detailflow_jax.runtime.checkpoint import (
    CheckpointError,
    Checkpoints,
    WriteError,
    restore_params,
)
from detailflow_jax.runtime.metrics import Diverged


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None
    extra: dict


# Reading damaged arrays leaves coroutines that Orbax never waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(value: float, *, ema: bool = True, width: int = 32) -> State:
    noise = jax.random.normal(jax.random.key(0), (64, width)) + value
    params = {"dense": {"kernel": noise, "bias": jnp.full(width, value, jnp.bfloat16)}}
    opt_state = OPTIMIZER.init(params)
    average = jax.tree.map(lambda x: x * 2, params) if ema else None
    flags = {"used": jnp.array([True, False])}
    return State(jnp.int32(value), params, opt_state, average, flags)


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(workdir, *steps: int, keep: int = 5) -> None:
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"next": step}, {"seconds": 0.1 * step})


def restore(workdir, state: State | None = None):
    with Checkpoints(workdir, 5) as checkpoints:
        return checkpoints.restore(abstract(make_state(0) if state is None else state))


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: messages.append(text % args))
    return messages


def test_newest_checkpoint_comes_back_as_one_unit(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 1, 2, 3, keep=2)
    restored = restore(tmp_path)
    assert (restored.step, restored.data) == (3, {"next": 3})
    assert restored.clock == {"seconds": 0.1 * 3}
    assert_same(restored.state, make_state(3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    add = jax.jit(
        lambda state: jax.tree.map(lambda x: x + x.dtype.type(1), state), donate_argnums=0
    )
    state = make_state(5, width=20_000).replace(extra={})
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(20):  # Overwrites the memory of the saved state while it is written.
            state = add(state)
        jax.block_until_ready(state)
    expected = make_state(5, width=20_000).replace(extra={})
    assert_same(restore(tmp_path, expected).state, expected)


def array_files(step: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in (step / "state").rglob("d/*") if p.stat().st_size > 1000]


def truncate(step: pathlib.Path) -> None:
    for file in array_files(step):
        file.write_bytes(file.read_bytes()[:100])


def flip_bits(step: pathlib.Path) -> None:
    for file in array_files(step):
        content = bytearray(file.read_bytes())
        for i in range(200, len(content), 500):  # Some in each of the larger arrays.
            content[i] ^= 4
        file.write_bytes(content)


def change_checksums(step: pathlib.Path) -> None:
    """What arrays that read well but differ look like."""
    clock = json.loads((step / "clock" / "metadata").read_text())
    clock["checksums"] = {name: value + 1 for name, value in clock["checksums"].items()}
    (step / "clock" / "metadata").write_text(json.dumps(clock))


def remove_manifest(step: pathlib.Path) -> None:
    (step / "state" / "manifest.ocdbt").unlink()


def break_description(step: pathlib.Path) -> None:
    (step / "state" / "_METADATA").write_text('{"tree')


def remove_clock(step: pathlib.Path) -> None:
    (step / "clock" / "metadata").unlink()


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_bits, change_checksums, remove_manifest, break_description, remove_clock],
)
def test_damaged_newest_is_passed_over_with_a_warning(tmp_path, warnings, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "2")
    assert_same(restore_params(tmp_path, ema=False), make_state(1).params)
    assert any("checkpoints/2 cannot be read" in text for text in warnings)

    restored = restore(tmp_path)
    assert restored.step == 1
    assert_same(restored.state, make_state(1))
    assert any("checkpoints/2 is damaged and passed over" in text for text in warnings)
    # The same step can be saved again, and what was damaged is kept for a look.
    save(tmp_path, 2)
    assert restore(tmp_path).step == 2
    assert (tmp_path / "checkpoints" / "2.damaged").exists()


def test_no_readable_checkpoint_is_an_error_not_a_new_start(tmp_path, warnings):
    save(tmp_path, 1, 2)
    for step in "12":
        truncate(tmp_path / "checkpoints" / step)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 1\]"):
        restore(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    with pytest.raises(CheckpointError, match="can be read"):
        restore_params(tmp_path)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"params/dense/bias is bfloat16\[32\] there.*\[33\]"):
        restore(tmp_path, make_state(0, width=33))
    with pytest.raises(CheckpointError, match=r"ema/dense/bias is bfloat16\[32\] there, absent"):
        restore(tmp_path, make_state(0, ema=False))
    assert restore(tmp_path).step == 2


def test_state_that_is_not_finite_is_never_saved(tmp_path):
    save(tmp_path, 1)
    state = make_state(2)
    state.params["dense"]["bias"] = state.params["dense"]["bias"].at[3].set(jnp.nan)
    with Checkpoints(tmp_path, 5) as checkpoints:
        with pytest.raises(Diverged, match="after step 2"):
            checkpoints.save(2, state, {}, {})
        assert checkpoints.latest() == 1


def test_interrupted_save_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    directory = tmp_path / "checkpoints"
    (directory / "1").rename(directory / "2.orbax-checkpoint-tmp")
    save(tmp_path, 3)
    assert sorted(p.name for p in directory.iterdir()) == ["3"]


def test_params_are_read_without_the_rest(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints"):
        restore_params(tmp_path)
    save(tmp_path, 1, 2)
    params = restore_params(tmp_path)
    assert type(params) is dict and type(params["dense"]["kernel"]) is np.ndarray
    assert_same(params, make_state(2).ema)
    assert_same(restore_params(tmp_path, ema=False), make_state(2).params)
    assert_same(restore_params(tmp_path, ema=False, step=1), make_state(1).params)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3.*\[1, 2\]"):
        restore_params(tmp_path, step=3)
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(3, make_state(3, ema=False), {}, {})
    assert_same(restore_params(tmp_path), make_state(3).params)


def test_iterator_state_is_copied_at_once(tmp_path):
    data = {"next": [1]}
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(1, make_state(1), data, {})
        data["next"][0] = 99
    assert json.loads((tmp_path / "checkpoints/1/data/metadata").read_text()) == {"next": [1]}


def test_full_disk_is_an_error_that_says_so_and_keeps_the_last_checkpoint(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, 1)
    try:  # No file may grow beyond 4 kB: writes fail as they do on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(WriteError, match=r"cannot write checkpoints to .*disk full"):
            checkpoints.save(2, make_state(2), {}, {})
            checkpoints.latest()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert restore(tmp_path).step == 1


def test_unusable_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        Checkpoints(tmp_path / "file", 1)
