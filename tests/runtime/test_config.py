"""Configuration files, overrides, variants, and the configuration that a workdir keeps."""

import json
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from detailflow_jax.runtime import config as config_lib
from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.workdir import hold_workdir

FILE = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from detailflow_jax.runtime.config import choose, decode_variant

SIZES = {"small": 8, "large": 64}

def get_config(arg=None):
    variant, options = decode_variant(arg, SIZES, runlocal=False, batch_size=16)
    return ConfigDict({
        "task": "toy",
        "batch_size": 2 if options.runlocal else options.batch_size,
        "flip": True,
        "untyped": None,
        "ema_decay": placeholder(float),
        "model": {"width": choose(variant, SIZES, "size"), "inner": {"depth": 2}},
        "optim": {"lr": 1e-3, "betas": (0.9, 0.95)},
        "data": {"prefetch": 0},
        "log_every": 10,
    })
"""


@pytest.fixture
def spec(tmp_path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    return f"{path}:small"


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("small,runlocal", "options follow a second colon, small:runlocal"),
        ("large,batch_size=4", "options follow a second colon, large:batch_size=4"),
        ("runlocal", "'runlocal' is an option: write it after a variant, VARIANT:runlocal, of sm"),
        ("batch_size=4", "'batch_size' is an option.*VARIANT:batch_size=4, of small, large"),
        ("smal", "unknown variant 'smal'; closest names: small"),
    ],
)
def test_options_need_a_second_colon(spec, arg, words):
    with pytest.raises(ConfigError, match=words):
        config_lib.load_config(spec.replace(":small", f":{arg}"))


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("batch_size=8", "batch_size", 8),
        ("flip=false", "flip", False),
        ("ema_decay=0.99", "ema_decay", 0.99),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.betas=(0.5, 0.6)", "optim.betas", (0.5, 0.6)),
        ("model.inner.depth=-3", "model.inner.depth", -3),
        ("task=a=b, c", "task", "a=b, c"),
    ],
)
def test_override_takes_the_type_of_its_field(spec, override, name, value):
    config = config_lib.load_config(spec, [f"--config.{override}"])
    found = config_lib.flatten(config)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.batchsize=8", ["'batchsize'", "closest names: batch_size"]),
        ("--config.lr=8", ["'lr'", "closest names: optim.lr"]),
        ("--config.model.inner.dept=8", ["'model.inner.dept'", "model.inner.depth"]),
        ("--config.qqqq=8", ["'qqqq'", "expected one of", "optim.betas"]),
        ("--config.batch_size=8.5", ["config.batch_size", "expected int", "16", "'8.5'"]),
        ("--config.flip=perhaps", ["config.flip", "expected bool", "'perhaps'"]),
        ("--config.ema_decay=x", ["config.ema_decay", "expected float"]),
        ("--config.untyped=3", ["config.untyped", "placeholder"]),
        ("--config.model={'width': 3}", ["config.model", "group"]),
        ("--config.batch_size", ["--config.NAME=VALUE"]),
    ],
)
def test_override_that_cannot_be_meant_is_refused(spec, override, words):
    with pytest.raises(ConfigError) as error:
        config_lib.load_config(spec, [override])
    assert all(word in str(error.value) for word in words), error.value


def test_later_override_wins_and_others_stay(spec):
    config = config_lib.load_config(spec, ["--config.batch_size=8", "--config.batch_size=4"])
    assert (config.batch_size, config.optim.lr) == (4, 1e-3)
    with pytest.raises(AttributeError):
        config.new_field = 1


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("smal", ["variant 'smal'", "closest names: small"]),
        ("", ["name a variant", "small, large"]),
        ("small:runlocl", ["option 'runlocl'", "runlocal"]),
        ("small:batch_size", ["batch_size", "needs a value"]),
        ("small:batch_size=x", ["option batch_size", "expected int", "'x'"]),
    ],
)
def test_unknown_variant_or_option_is_refused(spec, arg, words):
    path = spec.partition(":")[0]
    with pytest.raises(ConfigError) as error:
        config_lib.load_config(f"{path}:{arg}")
    assert all(word in str(error.value) for word in words), error.value


def test_variant_options(spec):
    path = spec.partition(":")[0]
    assert config_lib.load_config(f"{path}:large:batch_size=4").batch_size == 4
    assert config_lib.load_config(f"{path}:large:runlocal").batch_size == 2
    assert config_lib.load_config(f"{path}:large:runlocal=false").model.width == 64


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no config file 'configs/nothing\.py'.*FILE\.py"):
        config_lib.load_config("configs/nothing.py:digits")


def test_missing_file_is_an_error_with_the_places_and_the_files_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        config_lib.load_config("configs/tokenizr.py:digits")
    for words in (str(tmp_path), str(config_lib._SHIPPED), "configs/tokenizer.py, configs/vae.py"):
        assert words in str(error.value)
    assert "config_parts" not in str(error.value)
    with pytest.raises(ConfigError, match=r"no config file 'other/vae\.py'"):
        config_lib.load_config("other/vae.py")


def test_shipped_files_are_found_from_any_folder_but_the_working_directory_wins(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load_config("configs/tokenizer.py:digits").task == "tokenizer"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tokenizer.py").write_text(FILE)
    assert config_lib.load_config("configs/tokenizer.py:small").task == "toy"


def test_folders_of_configurations_do_not_mix(tmp_path):
    text = """
from ml_collections import ConfigDict
import config_parts
def get_config():
    import helper  # Also at this time a file beside this one is found.
    return ConfigDict({"images": config_parts.IMAGENET_IMAGES, "helper": helper.NAME})
"""
    for name in ("own_parts", "shipped_parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy.py").write_text(text)
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}")
    (tmp_path / "own_parts" / "config_parts.py").write_text("IMAGENET_IMAGES = 7")
    before = dict(sys.modules), list(sys.path)
    for _ in range(2):
        own = config_lib.load_config(str(tmp_path / "own_parts" / "toy.py"))
        assert (own.images, own.helper) == (7, "own_parts")
        shipped = config_lib.load_config(str(tmp_path / "shipped_parts" / "toy.py"))
        assert (shipped.images, shipped.helper) == (1_281_167, "shipped_parts")
    assert (dict(sys.modules), list(sys.path)) == before


def test_workdir_keeps_the_resolved_configuration(spec, tmp_path):
    config = config_lib.load_config(spec, ["--config.optim.betas=(0.1, 0.2)"])
    config_lib.write_config(config, tmp_path / "run")
    assert config_lib.flatten(config_lib.read_config(tmp_path / "run")) == config_lib.flatten(
        config
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    config_lib.check_same(config, tmp_path / "run")


def test_workdir_of_another_configuration_is_refused(spec, tmp_path):
    workdir = tmp_path / "run"
    config = config_lib.load_config(spec)
    config_lib.check_same(config, workdir)  # Nothing there yet.
    config_lib.write_config(config, workdir)
    harmless = ["--config.log_every=3", "--config.data.prefetch=4"]
    config_lib.check_same(config_lib.load_config(spec, harmless), workdir)

    other = config_lib.load_config(spec, ["--config.model.width=9", *harmless])
    with pytest.raises(ConfigError) as error:
        config_lib.check_same(other, workdir)
    assert "model.width: 8 in the workdir, 9 now" in str(error.value)
    assert "--workdir" in str(error.value)
    assert "log_every" not in str(error.value)

    fields = json.loads((workdir / "config.json").read_text())
    fields["model"]["gone"] = 1
    (workdir / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"model\.gone: 1 in the workdir, absent now"):
        config_lib.check_same(config, workdir)


def test_a_field_that_an_older_workdir_lacks_counts_as_its_default(spec, tmp_path):
    config_lib.write_config(config_lib.load_config(spec), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["model"]["inner"], fields["flip"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config_lib.check_same(config_lib.load_config(spec), tmp_path)
    other = config_lib.load_config(spec, ["--config.model.inner.depth=3"])
    with pytest.raises(ConfigError, match=r"model\.inner\.depth: 2 in the workdir, 3 now"):
        config_lib.check_same(other, tmp_path)


def test_a_resumed_run_may_be_longer_not_shorter(tmp_path):
    steps = lambda n: ConfigDict({"total_steps": n, "seed": 0})  # noqa: E731
    config_lib.write_config(steps(10), tmp_path)
    config_lib.check_same(steps(20), tmp_path)
    with pytest.raises(ConfigError, match="total_steps: 10 in the workdir, 9 now"):
        config_lib.check_same(steps(9), tmp_path)


def test_unusable_workdir_is_an_error_with_its_name(spec, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=str(file)):
        config_lib.write_config(config_lib.load_config(spec), file / "run")
    with (
        pytest.raises(ConfigError, match="cannot write to the workdir"),
        hold_workdir(file / "run"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        config_lib.read_config(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        config_lib.read_config(tmp_path)


def test_workdir_is_for_one_process_at_a_time(tmp_path):
    with hold_workdir(tmp_path / "run"):
        pass
    hold = f"import fcntl; f = open({str(tmp_path / 'run' / '.lock')!r}, 'w'); "
    hold += "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigError, match=f"another process is at work in {tmp_path}"),
            hold_workdir(tmp_path / "run"),
        ):
            pass
        other.kill()
    with hold_workdir(tmp_path / "run"):
        pass


def test_fields_are_checked_by_name_and_type():
    config = ConfigDict({"seed": 1, "mesh": {"data": 1.0}})
    config_lib.check_fields(config, {"seed": int})
    with pytest.raises(ConfigError, match=r"config\.mesh\.data is 1\.0: expected int, got float"):
        config_lib.check_fields(config, {"mesh.data": int})
    with pytest.raises(ConfigError, match=r"lacks config\.steps"):
        config_lib.check_fields(config, {"steps": int})


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(pathlib.Path(tmp_path).iterdir()) == [path]
