"""What is said in one line, and what keeps its traceback."""

import dataclasses
import pathlib

import pytest

import toy_task
from detailflow_jax import train
from detailflow_jax.runtime import errors

TOY = pathlib.Path(toy_task.__file__)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.ConfigError("x"), 2, "error: x"),
        (errors.NotFoundError("x"), 2, "error: x"),
        (errors.DataError("x"), 2, "error: x"),
        (errors.CheckpointError("x"), 2, "error: x"),
        (errors.WriteError("x"), 1, "failed: x"),
        (errors.FileError("x"), 1, "failed: x"),
        (errors.Diverged("x"), 1, "diverged: x"),
        (train.Preempted(3), 143, "preempted: saved step 3; run the same command to resume"),
    ],
)
def test_user_errors_are_one_line_and_an_exit_code(error, code, text, tmp_path, capsys):
    def run(config, workdir):
        raise error

    assert train.main(["--config", str(TOY), "--workdir", str(tmp_path)], run) == code
    assert capsys.readouterr().err == text + "\n"


@pytest.mark.parametrize("where", ["check", "plan"])
def test_a_bug_in_a_forked_task_keeps_its_traceback(where, tmp_path):
    """Python prints the traceback of what leaves `main`, and exits with 1."""

    def run(config, workdir):
        def broken(*args):
            raise ValueError("a bug in forked code")

        task = dataclasses.replace(toy_task.make_task(config), **{where: broken})
        return train.train(config, workdir, task, toy_task.make_iterator(config))

    with pytest.raises(ValueError, match="a bug in forked code") as raised:
        train.main(["--config", str(TOY), "--workdir", str(tmp_path)], run)
    assert not isinstance(raised.value, errors.UserError)


@pytest.mark.parametrize(("bug", "kind"), [('{}["a bug"]', KeyError), ('int("a bug")', ValueError)])
def test_a_bug_in_a_configuration_file_keeps_its_traceback(bug, kind, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config(arg=None):\n    return {bug}\n")
    with pytest.raises(kind, match="a bug") as raised:
        train.main(["--config", str(path), "--workdir", str(tmp_path)])
    assert not isinstance(raised.value, errors.UserError)


def test_a_configuration_file_refuses_its_argument_in_one_line(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(
        "from detailflow_jax.runtime.errors import ConfigError\n"
        'def get_config(arg=None):\n    raise ConfigError(f"no variant {arg}")\n'
    )
    assert train.main(["--config", f"{path}:x", "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {path}:x: no variant x\n"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("vae.py:small:image_size=40", "image_size=40: expected a multiple of 16 from 32 to 256"),
        ("vae.py:kl16:image_size=64", "image_size=64 is an option of the variant small"),
        ("vae.py:small:epochs=nan", "option epochs: expected a number of at least 0, got 'nan'"),
        ("vae.py:small:batch_size=-1", "option batch_size: expected a number of at least 0"),
    ],
)
def test_shipped_configurations_refuse_options_in_one_line(spec, text, tmp_path, capsys):
    assert train.main(["--config", f"configs/{spec}", "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: configs/{spec}: {text}")
