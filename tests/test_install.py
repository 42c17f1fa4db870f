"""An installed package without its extras, in a fresh environment, used from another folder."""

import os
import pathlib
import shutil
import subprocess
import venv
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
FORWARD = """
import importlib.util
import jax, numpy as np
import detailflow_jax as df
from detailflow_jax.models.generator import Generator, GeneratorConfig
from detailflow_jax.runtime.config import load_config

for name in ("tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "torch"):
    assert not importlib.util.find_spec(name), name
for name in df.__all__:
    getattr(df, name)
for name in ("tokenizer.py:detailflow_16", "generator.py", "vae.py:kl16", "flowar.py:flowar_s"):
    load_config(f"configs/{name}")
config = GeneratorConfig(width=32, depth=1, num_heads=2, num_tokens=16, group_size=4,
                         codebook_size=64, num_classes=10)
codes, labels = np.zeros((2, 16), np.int32), np.zeros(2, np.int32)
logits, _ = jax.jit(Generator(config).init_with_output)(jax.random.key(0), codes, labels)
assert all(np.isfinite(x).all() for x in jax.tree.leaves(logits))
print("computed", jax.tree.map(np.shape, logits))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> pathlib.Path:
    """A folder with photos, 4 in each of 2 classes; the sources are not there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for i, label in enumerate(["cat", "dog"] * 4):
        (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(picture).save(folder / "photos" / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory, elsewhere) -> Callable[..., str]:
    """Runs a command of a fresh environment with a base install, and returns its output."""
    folder = tmp_path_factory.mktemp("install")
    source, scripts = folder / "source", folder / "venv" / "bin"
    # A copy, since building leaves files beside the sources.
    for name in ("detailflow_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", with_pip=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def run(command: str, *arguments: str | os.PathLike, code: int = 0) -> str:
        done = subprocess.run(
            [scripts / command, *arguments],
            cwd=elsewhere,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    run("pip", "install", "--quiet", source)
    shutil.rmtree(source)
    return run


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_base_install_imports_and_computes(installed):
    assert "computed" in installed("python", "-c", FORWARD)
    assert installed("detailflow", "--help").startswith("usage: detailflow")
    assert "detailflow_jax 0." in installed("detailflow", "--version")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_base_install_trains_and_samples(installed, elsewhere):
    short = ["--config.total_steps=2", "--config.batch_size=4"]
    tokenizer = ["train", "--config=configs/tokenizer.py:digits:runlocal", "--workdir=tok"]
    installed("detailflow", *tokenizer, *short, "--config.data.source=folder:photos")
    assert len((elsewhere / "tok" / "metrics.jsonl").read_text().splitlines()) == 1
    assert list((elsewhere / "tok" / "tensorboard").iterdir())
    extract = ["extract", "--tokenizer=tok", "--source=folder:photos", "--out=codes"]
    installed("detailflow", *extract)
    generator = ["train", "--config=configs/generator.py:digits:runlocal,codes=codes"]
    installed("detailflow", *generator, *short, "--workdir=gen")
    generate = ["--tokenizer=tok", "--generator=gen", "--labels=0-1", "--per_class=2"]
    installed("detailflow", "generate", *generate, "--out=samples")
    with np.load(elsewhere / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 32, 32, 3)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["demo", "--out=demo"], "demo"),
        (["train", "--config=configs/tokenizer.py:digits", "--workdir=x"], "demo"),
        (["prepare", "--dataset=cifar10", "--data_dir=data"], "tfds"),
    ],
)
def test_what_needs_an_extra_names_it(installed, arguments, extra):
    output = installed("detailflow", *arguments, code=2)
    assert f"pip install 'detailflow_jax[{extra}]'" in output
    assert "Traceback" not in output
