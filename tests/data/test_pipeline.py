"""The training stream is a pure function of (seed, step), whatever reads it."""

import contextlib
import json
import multiprocessing
import pathlib

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from PIL import Image

from detailflow_jax.data import UnreadableImage, iterate_crops, make_iterator, make_source, workers
from detailflow_jax.data import errors as data_errors
from detailflow_jax.data.pipeline import ReadableSource
from detailflow_jax.runtime.errors import ConfigError, ReadError

DIGITS = {
    "source": "digits",
    "split": "test",
    "image_size": 16,
    "crop": "random",
    "min_scale": 0.8,
    "flip": True,
}


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def numbered_folder(path, count=10, broken=()):
    """One class of 8x8 images whose grey level is 20 times their place in the order."""
    (path / "only").mkdir(parents=True)
    for i in range(count):
        file = path / "only" / f"{i:02d}.png"
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(file)
        if i in broken:
            file.write_bytes(file.read_bytes()[:44])
    return {"source": f"folder:{path}", "image_size": 8, "crop": "none"}


def test_fields_and_types():
    batch = next(make_iterator(ConfigDict(DIGITS), batch_size=6, seed=0))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((6, 16, 16, 3), "uint8"),
        "label": ((6,), "int32"),
        "skipped": ((6,), "int32"),
    }
    assert not batch["skipped"].any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(process_count):
    whole = take(make_iterator(DIGITS, batch_size=8, seed=3), 60)  # 480 examples, 1.3 epochs.
    parts = [
        make_iterator(DIGITS, batch_size=8, seed=3, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    parts = [take(part, 60) for part in parts]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_prefetch_changes_nothing_and_the_seed_everything():
    first = take(make_iterator(DIGITS | {"prefetch": 0}, batch_size=8, seed=3), 4)
    assert_same(first, take(make_iterator(DIGITS | {"prefetch": 6}, batch_size=8, seed=3), 4))
    other = take(make_iterator(DIGITS, batch_size=8, seed=4), 4)
    assert any((a["label"] != b["label"]).any() for a, b in zip(first, other, strict=True))


def test_every_epoch_is_a_new_permutation(tmp_path):
    data = numbered_folder(tmp_path)
    stream = take(make_iterator(data, batch_size=5, seed=0), 8)
    order = np.concatenate([b["image"][:, 0, 0, 0] // 20 for b in stream]).reshape(4, 10)
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in order}) == 4


def test_random_numbers_differ_between_positions_of_one_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "only").mkdir()
    Image.fromarray(pixels).save(tmp_path / "only" / "a.png")
    data = {"source": f"folder:{tmp_path}", "image_size": 16, "crop": "random"}
    batch = next(make_iterator(data, batch_size=12, seed=0))
    assert len({image.tobytes() for image in batch["image"]}) > 9


def test_state_is_exact_and_json():
    iterator = make_iterator(DIGITS, batch_size=8, seed=1)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    fresh = make_iterator(DIGITS, batch_size=8, seed=1)
    fresh.set_state(state)
    assert_same(take(fresh, 5), expected)
    iterator.set_state(state)  # Back in time, over what was prefetched.
    assert_same(take(iterator, 5), expected)


def test_state_goes_through_an_orbax_checkpoint(tmp_path):
    iterator = make_iterator(DIGITS, batch_size=8, seed=1)
    take(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
        manager.save(3, args=save)
    expected = take(iterator, 2)
    fresh = make_iterator(DIGITS, batch_size=8, seed=1)
    with ocp.CheckpointManager(tmp_path) as manager:
        restore = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh))
        manager.restore(3, args=restore)
    assert_same(take(fresh, 2), expected)


def test_worker_processes_change_nothing(tmp_path, caplog, monkeypatch):
    images = numbered_folder(tmp_path, broken=(3, 4)) | {"crop": "random", "flip": True}
    plain = take(make_iterator(images, batch_size=8, seed=1), 6)
    data_errors._reported.clear()
    caplog.clear()
    data = images | {"num_workers": 2, "worker_buffer": 2, "num_threads": 3}
    with contextlib.closing(make_iterator(data, batch_size=8, seed=1)) as iterator:
        assert_same(take(iterator, 3), plain[:3])
        state = json.loads(json.dumps(iterator.get_state()))
        assert_same(take(iterator, 2), plain[3:5])
        iterator.set_state(state)
        assert_same(take(iterator, 3), plain[3:])
        # One that is killed is not started again for ever.
        monkeypatch.setattr(workers, "RESTARTS", 0)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(ReadError, match=r"ended 1 times: .* exit code -9"):
            take(iterator, 20)
    said = [record.getMessage() for record in caplog.records]
    names = [text for text in said if text.startswith("skipping")]  # In this process's log.
    assert len(names) == 2 and all("only/0" in name for name in names)
    alone = make_iterator(images, batch_size=8, seed=1)
    alone.set_state(state)  # Another number of workers goes on from it.
    assert_same(take(alone, 3), plain[3:])


@pytest.mark.skipif(not pathlib.Path("/dev/shm").is_dir(), reason="it cannot be measured")
def test_shared_memory_that_is_too_small_is_noticed_at_the_start(tmp_path):
    data = numbered_folder(tmp_path) | {"image_size": 200_000, "num_workers": 3}
    # 14 batches of 8 x 200,000 x 200,000 x 3 bytes.
    with pytest.raises(ConfigError, match=r"MiB free, 12817383 MiB are needed, for 14 batches"):
        make_iterator(data, batch_size=8, seed=0)


def test_broken_records_are_replaced_by_the_next_counted_and_named_once(tmp_path, caplog):
    data = numbered_folder(tmp_path, broken=(3, 4, 9))
    source = ReadableSource(make_source(data["source"]))
    seen = [
        (source[i]["image"].pixels.getpixel((0, 0))[0] // 20, source[i]["skipped"])
        for i in range(10)
    ]
    assert seen == [(0, 0), (1, 0), (2, 0), (5, 2), (5, 1), (5, 0), (6, 0), (7, 0), (8, 0), (0, 1)]
    names = [r.getMessage() for r in caplog.records]
    assert len(names) == 3 and all(f"0{i}.png" in n for i, n in zip((3, 4, 9), names, strict=True))
    whole = take(make_iterator(data, batch_size=10, seed=0), 2)
    assert [b["skipped"].sum() for b in whole] == [4, 4]
    halves = [
        next(make_iterator(data, batch_size=10, seed=0, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert_same([{k: np.concatenate([h[k] for h in halves]) for k in halves[0]}], whole[:1])


def test_data_that_are_all_broken_stop_the_run(tmp_path):
    data = numbered_folder(tmp_path, count=3, broken=(0, 1, 2))
    with pytest.raises(RuntimeError, match=r"3 records in a row .* unreadable.*only/0\d.png"):
        next(make_iterator(data, batch_size=2, seed=0))


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({"source": "digit"}, {}, "unknown data source 'digit'.*closest names: digits"),
        ({"source": "kodes:x"}, {}, "closest names: codes"),
        ({"min_scale": 0.0, "scaled_decode": True}, {}, "min_scale=0.0"),
        ({"crop": "centre"}, {}, "unknown crop 'centre'.*closest names: center"),
        ({}, {"batch_size": 9, "process_count": 2}, "batch_size=9 .*multiple of the 2 processes"),
        ({}, {"process_index": 2, "process_count": 2}, "process_index=2 of 2"),
    ],
)
def test_unusable_configurations_are_refused(change, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_iterator(DIGITS | change, **{"batch_size": 8, "seed": 0, **kwargs})


def test_iterate_crops_keeps_order_and_reports_broken_records(tmp_path):
    data = numbered_folder(tmp_path, broken=(6,))
    source = make_source(data["source"])
    out = list(iterate_crops(source, range(4, 9), 8, "five"))
    assert [position for position, _ in out] == [4, 5, 6, 7, 8]
    for position, example in out:
        if position == 6:
            assert isinstance(example, UnreadableImage) and "06.png" in example.name
        else:
            assert example["crops"].shape == (5, 8, 8, 3) and example["label"] == 0
            assert (example["crops"] == 20 * position).all()
    assert list(iterate_crops(source, range(0), 8, "five")) == []
