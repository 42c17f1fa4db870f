"""Class names: listed by the command, kept with a run, and used to choose labels."""

import json
import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from convert_models import random_params
from detailflow_jax.convert.export import export
from detailflow_jax.data import classes, make_iterator
from detailflow_jax.data.classes import (
    check_same_classes,
    class_names,
    parse_labels,
    shown,
    warn_of_other_names,
)
from detailflow_jax.models.generator import GeneratorConfig
from detailflow_jax.runtime.config import check_same, read_config, write_config
from detailflow_jax.runtime.errors import ConfigError

NAMES = ("cat", "dog", "7", "Hot dog, mustard", "x-1")


@pytest.fixture
def folder(tmp_path):
    for name in ("2", "10", "1"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / name / "a.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-2,4", [0, 1, 2, 4]),
        ("dog,cat", [1, 0]),
        (" dog , 3,cat", [1, 3, 0]),
        ("7", [7]),  # A number is a label, not a name.
        ("Hot dog, mustard", [3]),
        ("x-1,0-1", [4, 0, 1]),
        ("cat,Hot dog, mustard,1", [0, 3, 1]),
    ],
)
def test_labels_are_numbers_or_names(text, expected):
    assert parse_labels(text, NAMES) == expected


def test_a_name_is_shown_on_one_line():
    assert shown(["new\nline", "tab\tx", "\u00dcn\u00ef \udcff"]) == (
        "0: new\\nline, 1: tab\\tx, 2: \u00dcn\u00ef \\xff"
    )


def test_accents_are_the_same_in_either_form():
    assert parse_labels("caf\u00e9", ["dog", "cafe\u0301"]) == [1]
    assert parse_labels("cafe\u0301,dog", ["dog", "caf\u00e9"]) == [1, 0]


@pytest.mark.parametrize("text", ["5-3", "0-99999999", "1,9-8"])
def test_ranges_that_are_none(text):
    with pytest.raises(ConfigError, match="is no range of labels"):
        parse_labels(text, NAMES)


def test_a_number_that_is_the_name_of_another_class_is_told(caplog):
    assert parse_labels("0,1", ("0", "2", "1")) == [0, 1]
    assert [r.getMessage() for r in caplog.records] == [
        "1 is label 1, not the class named '1', which is label 2"
    ]


def test_unknown_labels_suggest_names():
    with pytest.raises(ConfigError, match=r"no class 'dgo'.*closest names: dog"):
        parse_labels("cat,dgo", NAMES)
    with pytest.raises(ConfigError, match=r"closest names: new\\nline"):
        parse_labels("new line", ["new\nline"])
    for text in ("dog", "", "1,,2", "1-", "²"):
        with pytest.raises(ConfigError, match="expected numbers as in 0-9"):
            parse_labels(text)


def test_the_command_lists_what_images_and_runs_hold(folder, tmp_path, capsys):
    data = {"source": f"folder:{folder}", "image_size": 8, "crop": "none"}
    iterator = make_iterator(data, batch_size=1, seed=0)
    assert iterator.class_names == ("1", "2", "10")
    config = ConfigDict({"seed": 0})
    write_config(config, tmp_path / "run", iterator.class_names)
    assert read_config(tmp_path / "run").class_names == ("1", "2", "10")
    check_same(config, tmp_path / "run")
    for place in (folder, f"folder:{folder}", tmp_path / "run"):
        assert classes.main([str(place)]) == 0
        assert capsys.readouterr().out == "0\t1\n1\t2\n2\t10\n"
    assert class_names("digits") == tuple("0123456789")
    write_config(config, tmp_path / "old")
    write_config(ConfigDict({"data": data}), tmp_path / "older")
    assert class_names(str(tmp_path / "older")) == ("1", "2", "10")
    for place, words in ((tmp_path / "old", "no class names"), (tmp_path / "none", "no image")):
        assert classes.main([str(place)]) == 2
        assert words in capsys.readouterr().err


def test_an_export_has_its_class_names_in_the_other_file(tmp_path):
    config = GeneratorConfig(
        width=8, depth=1, num_heads=1, num_tokens=8, codebook_size=4, num_classes=2
    )
    params = random_params("generator", config, scan=False)
    path = tmp_path / "gen" / "model.safetensors"
    export("generator", config, params, path, class_names=["cat", "7"])
    assert class_names(str(tmp_path / "gen")) == ("cat", "7")
    texts = dict.fromkeys(("[1]", "class_names: [1, 2]", "x: !!python/tuple [1]"), "no class names")
    for text, message in (texts | {"{": "cannot read .*config.yaml: .*; expected YAML"}).items():
        (tmp_path / "gen" / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            class_names(str(tmp_path / "gen"))


def test_a_run_keeps_its_classes(tmp_path):
    check_same_classes(("a", "b"), tmp_path)
    write_config(ConfigDict({"seed": 0}), tmp_path, ("a", "b"))
    check_same_classes(("a", "b"), tmp_path)
    check_same_classes((), tmp_path)
    with pytest.raises(ConfigError, match=r"the classes 0: a, 1: b; the data have 0: b, 1: a"):
        check_same_classes(("b", "a"), tmp_path)


def test_a_manifest_has_class_names(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"class_names": ["a", "b"]}))
    assert class_names(f"codes:{tmp_path}") == class_names(str(tmp_path)) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{}", "class_names are None"),
        ("manifest.json", "{", "expected JSON"),
        ("manifest.json", '{"class_names": [1]}', "expected a list of texts"),
        ("manifest.json", '{"class_names": ["a", "b", "a"]}', "two classes have the name 'a'"),
        ("config.json", "{", "expected JSON"),
        ("config.json", '{"class_names": 7}', "class_names is 7, expected a list"),
        ("config.json", '{"class_names": [7]}', "expected a list of texts"),
        ("config.json", '{"data": null}', "data is None, expected a section"),
        ("config.json", '{"data": {"source": 7}}', "no class names"),
        ("config.json", '{"a.b": 7}', "is not a configuration"),
    ],
)
def test_files_that_name_no_classes_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        class_names(str(tmp_path))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["classes.txt", "manifest.json", "config.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is a pipe, socket or device: expected a regu"):
        class_names(str(tmp_path))


def test_weights_of_classes_with_other_names_are_told(tmp_path, caplog):
    write_config(ConfigDict({"task": "generator"}), tmp_path, ("cat", "dog"))
    start = {"model": f"{tmp_path}#ema"}
    for same in (("cat", "dog"), ("a", "b", "c")):  # Another number starts anew.
        warn_of_other_names(same, start)
    warn_of_other_names(("a", "b"), start | {"classes": "1,0"})
    warn_of_other_names(("a", "b"), {"model": "hf:owner/name"})
    assert not caplog.text
    warn_of_other_names(("dog", "owl"), start)
    assert "are 0: cat, 1: dog: their vectors" in caplog.text
    assert "--config.init_from.classes=1,new" in caplog.text
