"""What a step needs is known before it runs; the message says what to lower."""

import jax
import jax.numpy as jnp
import pytest

from detailflow_jax import train
from detailflow_jax.runtime import memory
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError

SPEC = "configs/tokenizer.py:detailflow_16:plain,batch_size=64"


@pytest.fixture
def config():
    return load_config(SPEC)


def step_of(size):
    """A step that keeps [size, size] and computes a product of it in between."""
    function = lambda x: x + jnp.sin(x @ x).T @ x  # noqa: E731
    return jax.jit(function).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()


def test_a_step_that_fits_is_told_and_one_that_does_not_is_refused(config, monkeypatch):
    monkeypatch.setattr(memory, "_shared_by", lambda: 1)
    program = step_of(1024)  # 4 MiB an array
    assert "it needs 0.0 GiB of " in memory.check(program, config)
    monkeypatch.setattr(memory, "available", lambda: 5 << 20)
    with pytest.raises(memory.TooLarge) as error:
        memory.check(program, config)
    assert isinstance(error.value, ConfigError)
    for words in ("--config.batch_size (64)", "remat=full", "configs/tokenizer.py:small"):
        assert words in str(error.value)
    # The parts that are advised are the fewest that fit: 10 GiB, and 60 in between, of 30.
    text = memory.advice(config, kept=10, temporary=60, there=30)
    assert "--config.accumulate=4" in text
    assert "accumulate" not in memory.advice(config, kept=40, temporary=60, there=30)


def test_running_out_of_memory_says_what_to_lower(config):
    words = r"RESOURCE_EXHAUSTED.*Lower --config.batch_size"
    with pytest.raises(memory.TooLarge, match=words), memory.explained(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 180 GB")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explained(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.full
def test_a_run_ends_before_its_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    arguments = ["--config=configs/vae.py:digits:runlocal", "--workdir", str(tmp_path)]
    assert train.main([*arguments, "--config.tensorboard=False"]) == 2
    error = capsys.readouterr().err
    assert "GiB of memory, there are 0.0 GiB" in error and "config.batch_size (8)" in error
    assert not (tmp_path / "config.json").exists()
