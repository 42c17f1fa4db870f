"""A generator of one class, or of none, on the codes of one folder of images."""

import json

import numpy as np
import pytest

import detailflow_jax as df
from detailflow_jax import data, train
from detailflow_jax.convert import __main__ as converting
from detailflow_jax.data.classes import class_names
from detailflow_jax.inference import generate, hub
from detailflow_jax.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Made-up codes of 16 images of one class, in the form of the digits' recipe."""
    folder = tmp_path_factory.mktemp("codes")
    layout = data.CodeLayout(16, 16, 1, num_tokens=16, codebook_size=256)
    definition = dict.fromkeys(layout.needed, 0)
    definition |= {"class_names": ["all"], "num_classes": 1, "image_size": 32, "group_size": 4}
    data.open_extraction(str(folder), layout, definition | {"causal_num": 4})
    made = np.random.default_rng(0).integers(0, 256, (16, 1, 16, 3))
    data.write_shard(str(folder), layout, 0, [(i, 0, made[i]) for i in range(16)], {})
    data.write_manifest(str(folder), layout)
    return folder


@pytest.mark.parametrize("class_dropout", [pytest.param(0.0, marks=pytest.mark.full), 1.0])
def test_one_class_and_none(codes, tmp_path, class_dropout):
    arguments = [
        "--config=configs/generator.py:digits:runlocal",
        f"--config.data.source=codes:{codes}",
        "--config.model.num_classes=1",
        f"--config.model.class_dropout={class_dropout}",
        "--config.total_steps=1",
        "--config.tensorboard=False",
        f"--workdir={tmp_path}",
    ]
    assert train.main(arguments) == 0
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["loss"])
    assert class_names(str(tmp_path)) == ("all",)
    generator = df.load_generator(str(tmp_path))
    assert generate.labels_of("all,0", generator) == [0, 0]
    with pytest.raises(ConfigError, match="there is no class 'cat' among 0: all"):
        generate.labels_of("cat", generator)
    convert = ["--src", str(tmp_path), "--dst", str(tmp_path / "jax")]
    assert converting.main(["--to", "jax", *convert]) == 0
    hub.write(generator, tmp_path / "hub", "owner/name")
    df.save_pytorch(generator, tmp_path / "published" / "gen.safetensors")
    for place in ("jax", "hub", "published/gen.safetensors"):
        assert df.load_generator(tmp_path / place, num_heads=4).class_names == ("all",)
    sampled = generator.sample([0, 0], seed=0, cfg_scale=1.0)
    assert sampled.shape == (2, 16) and 0 <= sampled.min() <= sampled.max() < 256
