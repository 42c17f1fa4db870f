"""A network as config.json and model.safetensors: what is damaged is an error of one line."""

import json

import numpy as np
import pytest
import safetensors.numpy

from convert_models import random_params
from detailflow_jax.convert import portable
from detailflow_jax.convert.load import load
from detailflow_jax.models.generator import GeneratorConfig
from detailflow_jax.runtime.errors import UserError

CONFIG = GeneratorConfig(
    width=16, depth=1, num_heads=2, num_tokens=8, group_size=4, codebook_size=32, num_classes=3
)


@pytest.fixture(scope="module")
def params():
    return random_params("generator", CONFIG, scan=True)


@pytest.fixture
def folder(params, tmp_path):
    portable.write(tmp_path, "generator", CONFIG, params)
    return tmp_path


def test_there_and_back(folder, params):
    found = load("generator", folder)
    assert found.config == CONFIG and not found.notices
    np.testing.assert_array_equal(found.params["output"]["kernel"], params["output"]["kernel"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task", ["generator"], "task is .*expected text"),
        ("model", {"zzz": 1}, "zzz is no field"),
        ("model", {"a.b": 1}, "is not a configuration"),
        ("model", {"width": "16"}, "width='16'; expected at least 1, a whole number up to"),
        ("model", {"width": 16.0}, r"width=16\.0; expected at least 1, a whole"),
        ("model", {"width": 0}, "width=0; expected at least 1"),
        ("model", {"depth": -1}, "depth=-1; expected at least 1"),
        ("model", {"num_heads": 3}, "width=16 is no multiple of 4 x num_heads=3"),
        (
            "model",
            {"num_tokens": 10**9},
            "num_tokens=1000000000; expected at least 1, a whole number up to",
        ),
        ("model", {"causal_num": "4"}, "causal_num='4'; expected int"),
        ("model", {"head": 5}, "head=5; expected str"),
        ("model", {"scan": "yes"}, "scan='yes'; expected bool"),
        ("class_names", 7, "class_names is 7, expected a list"),
        ("encoded_by", [1], "encoded_by is .*expected text"),
    ],
)
def test_a_configuration_that_cannot_be(folder, name, value, message):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields[name] = fields["model"] | value if name == "model" else value
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        load("generator", folder)


def test_a_run_without_a_network(tmp_path):
    path = tmp_path / "config.json"
    for content, message in (
        ({"task": "generator"}, "has no section model"),
        ({"task": "generator", "model": None}, "model is None, expected a section"),
        ({"task": "generator", "model": {}, "losses": 5}, "losses is 5, expected a section"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load("generator", tmp_path)
    path.write_text(json.dumps({"task": "generator", "model": {}}))
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="no checkpoints"):
        load("generator", tmp_path)


def test_weights_that_cannot_be(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    kernel = tensors["output/kernel"]
    for change, message in (
        ({"output/kernel/deeper": kernel}, "'output/kernel/deeper' lies under a tensor"),
        ({"other": kernel}, "other is .*expected absent"),
        ({"output/kernel": kernel[1:]}, "output/kernel is .*expected"),
    ):
        safetensors.numpy.save_file(tensors | change, path)
        with pytest.raises(UserError, match=message):
            load("generator", folder)
    safetensors.numpy.save_file(tensors | {"output/kernel": kernel * np.nan}, path)
    assert any("hold NaN" in notice for notice in load("generator", folder).notices)
