"""Code shards: written restartably, refused when incomplete or foreign, read at random."""

import io
import json
import multiprocessing
import os
import random
import re
import signal
import time

import numpy as np
import pytest

from detailflow_jax.data import (
    CODEBOOK,
    CodeLayout,
    CodeSource,
    make_iterator,
    open_extraction,
    pending_shards,
    write_manifest,
    write_shard,
)
from detailflow_jax.runtime.errors import ConfigError

LAYOUT = CodeLayout(
    num_examples=47, shard_size=5, num_crops=3, num_tokens=8, codebook_size=512
)  # Ten shards, the last of two.
DEFINITION = {
    "source": "digits:test:abc",
    "tokenizer": "step 100 of run x",
    "class_names": list("0123456789"),
    "num_classes": 10,
    "image_size": 32,
    "group_size": 4,
    "causal_num": 4,
    "crops": "five",
    "seed": 0,
}
BROKEN = {7, 20, 21, 22, 23, 24}  # Shard 4 has no record at all.


def codes_of(index):
    """Made-up codes: a pure function of the position, as a real extraction is."""
    return np.random.default_rng(index).integers(0, 512, (3, 8, 3))


def extract(directory, pause=0.0, process_index=0, process_count=1):
    """A whole extraction; `pause` between records leaves time to be killed anywhere."""
    open_extraction(directory, LAYOUT, DEFINITION)
    for shard in pending_shards(directory, LAYOUT, process_index, process_count):
        unreadable = {}

        def records(shard=shard, unreadable=unreadable):
            for index in LAYOUT.positions(shard):
                time.sleep(pause)
                if index in BROKEN:
                    unreadable[index] = f"img/{index}.png"
                else:
                    yield index, index % 10, codes_of(index)

        write_shard(directory, LAYOUT, shard, records(), unreadable)


def extract_all(directory, pause=0.0):
    extract(directory, pause)
    write_manifest(directory, LAYOUT)


def contents(directory):
    return {e.name: open(e.path, "rb").read() for e in os.scandir(directory)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("codes"))
    extract_all(path)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished folder that a test may damage."""
    for name, data in contents(finished).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_every_readable_image_is_read_back(finished):
    source = CodeSource(finished)
    readable = [i for i in range(47) if i not in BROKEN]
    assert len(source) == len(readable) == 41
    for place in random.Random(0).sample(range(41), 41):
        record, index = source[place], readable[place]
        assert record["index"] == index and record["label"] == index % 10
        assert record["codes"].dtype == np.int32
        np.testing.assert_array_equal(record["codes"], codes_of(index))
    manifest = source.manifest
    assert manifest.items() >= DEFINITION.items() and manifest["num_records"] == 41
    assert manifest["unreadable"] == [[i, f"img/{i}.png"] for i in sorted(BROKEN)]
    assert [s["num_records"] for s in manifest["shards"]] == [5, 4, 5, 5, 0, 5, 5, 5, 5, 2]
    assert source.num_classes == 10 and source.class_names[3] == "3"


def extract_slowly(begun, directory):
    begun.send(None)
    extract_all(directory, pause=0.01)


def test_killed_anywhere_and_restarted_the_bytes_are_the_same(finished, tmp_path):
    # Forked from a server that has made the slow imports already.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["detailflow_jax.data", "pytest"])
    directory, rng = str(tmp_path / "codes"), random.Random(1)
    kills = half_written = 0
    while not os.path.exists(os.path.join(directory, "manifest.json")):
        begun, report = processes.Pipe(duplex=False)
        child = processes.Process(target=extract_slowly, args=(report, directory))
        child.start()
        begun.recv()
        # A shard takes 0.06 s, all of them 0.6 s, and more on a machine at work.
        child.join(rng.uniform(0.0, 0.2 + kills / 50))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if os.path.isdir(directory):
            half_written += any("partial" in name for name in os.listdir(directory))
        assert kills < 100
    assert kills >= 3 and half_written >= 2  # The kills did fall into the writing.
    assert contents(directory) == contents(finished)


def test_several_processes_share_the_shards(finished, tmp_path):
    open_extraction(tmp_path, LAYOUT, DEFINITION)
    shares = [pending_shards(tmp_path, LAYOUT, i, 3) for i in range(3)]
    assert sorted(shard for share in shares for shard in share) == list(range(10))
    for i in range(3):
        extract(tmp_path, process_index=i, process_count=3)
        if i < 2:
            with pytest.raises(ValueError, match="shards are not written"):
                write_manifest(tmp_path, LAYOUT)
    write_manifest(tmp_path, LAYOUT)
    assert contents(tmp_path) == contents(finished)


def test_a_finished_extraction_has_nothing_to_do(copied):
    before = {e.name: e.stat().st_mtime_ns for e in os.scandir(copied)}
    open_extraction(copied, LAYOUT, DEFINITION)
    assert pending_shards(copied, LAYOUT) == []
    assert {e.name: e.stat().st_mtime_ns for e in os.scandir(copied)} == before


def test_another_extraction_is_refused_by_field(finished):
    other = DEFINITION | {"tokenizer": "step 200 of run x", "seed": 1}
    with pytest.raises(ValueError, match=r"(?s)differs in\n  seed: 0 there, 1 asked\n  tokenizer"):
        open_extraction(finished, LAYOUT, other)
    layout = CodeLayout(47, 6, 3, 8, 512)
    with pytest.raises(ValueError, match="shard_size: 5 there, 6 asked"):
        open_extraction(finished, layout, DEFINITION)
    with pytest.raises(ValueError, match="lacks causal_num, seed"):
        lacking = {k: v for k, v in DEFINITION.items() if k not in ("seed", "causal_num")}
        open_extraction(finished, LAYOUT, lacking)


def test_shards_without_a_layout_are_refused(copied):
    (copied / "layout.json").unlink()
    with pytest.raises(ValueError, match=r"no layout\.json"):
        open_extraction(copied, LAYOUT, DEFINITION)


def test_wrong_records_are_refused_and_leave_no_shard(tmp_path):
    open_extraction(tmp_path, LAYOUT, DEFINITION)
    good = [(i, 0, codes_of(i)) for i in range(5)]
    for records, message in [
        (good[:4], "got 4 records"),
        ([good[1], good[0], *good[2:]], "in order"),
        ([(0, 0, codes_of(0)[:2]), *good[1:]], r"codes of 0: int64 \(2, 8, 3\)"),
        ([(0, 0, codes_of(0) + 200), *good[1:]], r"outside of \[0, 512\)"),
        ([(0, 0, codes_of(0) / 2), *good[1:]], "float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path, LAYOUT, 0, records, {})
        assert pending_shards(tmp_path, LAYOUT)[0] == 0
        assert os.listdir(tmp_path) == ["layout.json"]


def test_a_folder_of_something_else_is_named_as_what_it_is(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is the workdir of a training run.*extract"):
        CodeSource(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no codes but checkpoints: expected"):
        CodeSource(str(tmp_path))


def test_unfinished_or_missing_folders_are_refused(copied, tmp_path_factory):
    (copied / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished, run the same command again"):
        CodeSource(str(copied))
    for name in ("", str(copied / "nowhere")):
        with pytest.raises(FileNotFoundError, match="no folder of codes"):
            CodeSource(name)


def test_damaged_folders_are_refused_by_file(copied):
    shard = copied / LAYOUT.file_name(3)
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        CodeSource(str(copied))
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} has {len(data) // 2} bytes"):
        CodeSource(str(copied))
    shard.write_bytes((copied / LAYOUT.file_name(1)).read_bytes())
    with pytest.raises(ValueError, match=f"{shard.name} has 4 records"):
        CodeSource(str(copied))
    shard.write_bytes(data)
    assert len(CodeSource(str(copied))) == 41


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 16}, "record 0 has 156 bytes"),
        ({"codebook_size": 70_000}, "record 0 has 156 bytes"),
        ({"format_version": 9}, "format_version 9"),
        ({"num_classes": 9, "class_names": list("012345678")}, "label of 9 is 9, num_classes is 9"),
        ({"codebook_size": 16}, r"outside of \[0, 16\)"),
        ({"num_classes": 9}, "contradicts itself: num_classes is 9, class_names "),
        ({"num_classes": "10"}, "num_classes is '10', expected a whole number"),
        ({"group_size": 4.0}, r"group_size is 4\.0, expected a whole number"),
        ({"group_size": ...}, "lacks group_size"),
        ({"shards": ...}, "lacks shards"),
        ({"shards": {"file": "x"}}, "a shard is {'file': 'x'}, expected file"),
        ({"shards": [{"file": "x", "num_records": 1}]}, "expected file .in this folder., num_rec"),
        ({"shards": [{"file": "../x", "num_records": 1, "num_bytes": 1}]}, "in this folder"),
        ({"num_records": 40}, "contradicts itself: num_records is 40, its shards have 41"),
        ({"class_names": [0] * 10}, "class_names are .*expected a list of texts"),
        ({"encoded_by": 5}, "encoded_by is 5, expected text"),
        ({"group_size": 0}, "group_size is 0, expected a whole number from 1 to"),
        ({"num_tokens": 2**40}, "num_tokens is 1099511627776, expected"),
        ({"num_crops": 2**30, "num_tokens": 2**30}, "describes no records"),
    ],
)
def test_a_manifest_that_does_not_describe_the_records_is_refused(change, message, copied):
    path = copied / "manifest.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: x for name, x in fields.items() if x is not ...}))
    with pytest.raises(ConfigError, match=message):
        CodeSource(str(copied))


@pytest.mark.parametrize("content", ["", '{"a":', "[1]", "null", "[" * 100_000, "\xff{"])
@pytest.mark.parametrize("name", ["manifest.json", "layout.json", "codes-00000-of-00010.json"])
def test_a_damaged_json_file_is_named(name, content, copied):
    (copied / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(name)):
        if name == "manifest.json":
            CodeSource(str(copied))
        else:
            write_manifest(str(copied), LAYOUT)


def test_a_list_of_unreadable_images_that_is_none_is_refused(copied):
    sidecar = copied / "codes-00000-of-00010.json"
    for content in ('{"unreadable": 5}', '{"unreadable": [[1]]}', '{"unreadable": [["1", "x"]]}'):
        sidecar.write_text(content)
        with pytest.raises(ConfigError, match="remove it and codes-00000-of-00010"):
            write_manifest(str(copied), LAYOUT)
    sidecar.unlink()
    with pytest.raises(ConfigError, match="is missing"):
        write_manifest(str(copied), LAYOUT)


@pytest.mark.parametrize("part", [slice(0, None), slice(100, 200)])
def test_a_damaged_shard_of_the_right_size_is_refused(part, copied):
    shard = copied / LAYOUT.file_name(0)
    content = bytearray(shard.read_bytes())
    content[part] = bytes(len(content[part]))
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged .*run the extraction again"):
        CodeSource(str(copied))


def test_a_codebook_that_is_none_is_refused(copied):
    path = copied / CODEBOOK
    np.savez(copied / "x.npz", np.zeros(3))
    objects = io.BytesIO()
    np.save(objects, np.array([None]), allow_pickle=True)
    for content in (b"", b"text", (copied / "x.npz").read_bytes(), objects.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"codebook\.npy is no array"):
            CodeSource.read_codebook(str(copied))
    np.save(path, np.zeros((512, 4)))
    with pytest.raises(ConfigError, match=r"is float64 \(512, 4\), expected finite float32"):
        CodeSource.read_codebook(str(copied))


def test_large_codebooks_take_four_bytes(tmp_path):
    layout = CodeLayout(3, 2, 1, 2, 100_000)
    open_extraction(tmp_path, layout, DEFINITION)
    codes = np.array([0, 65_535, 65_536, 99_999, 5, 6]).reshape(1, 2, 3)
    for shard in pending_shards(tmp_path, layout):
        write_shard(tmp_path, layout, shard, [(i, 1, codes) for i in layout.positions(shard)], {})
    write_manifest(tmp_path, layout)
    np.testing.assert_array_equal(CodeSource(str(tmp_path))[2]["codes"], codes)


def test_training_draws_every_crop_and_keeps_the_label(finished):
    data = {"source": f"codes:{finished}", "num_workers": 0, "prefetch": 2}
    source = CodeSource(finished)
    crops = {c.tobytes(): (i, k) for i in range(41) for k, c in enumerate(source[i]["codes"])}
    stream = make_iterator(data, batch_size=41, seed=0)
    drawn = set()
    for _ in range(8):
        batch = next(stream)
        assert batch["codes"].shape == (41, 8, 3) and batch["codes"].dtype == np.int32
        assert batch["label"].dtype == np.int32
        places = [crops[codes.tobytes()] for codes in batch["codes"]]
        assert sorted(i for i, _ in places) == list(range(41))
        assert [source[i]["label"] for i, _ in places] == batch["label"].tolist()
        drawn |= set(places)
    assert len(drawn) > 0.9 * len(crops)


def test_layout_refuses_empty_dimensions():
    with pytest.raises(ValueError, match="num_tokens=0"):
        CodeLayout(1, 1, 1, 0, 1)
