"""The command line of training."""

import pytest

import toy_task
from detailflow_jax import train
from detailflow_jax.train import UNUSABLE


def test_unknown_option_leaves_with_a_hint(tmp_path, capsys):
    arguments = ["--config", toy_task.FILE, "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit) as leave:
        train.main([*arguments, "--batch_size=3"])
    assert leave.value.code == UNUSABLE
    assert "'--batch_size=3'" in capsys.readouterr().err
    assert train.main([*arguments, "--config.batchsize=3"]) == UNUSABLE
    assert "closest names: batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leave:
        train.main(["--help"])
    assert leave.value.code == 0
    assert "--config.batch_size=64" in capsys.readouterr().out
