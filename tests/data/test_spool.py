"""Sorting by way of the disk: right order, and nothing lost wherever the process ends."""

import hashlib
import itertools
import os

import pytest

from detailflow_jax.data.spool import Spool, SpoolError


class Killed(BaseException):
    """Stands for the end of the process: no clean-up of ours catches it."""


def examples(count=60):
    """(key, example); keys are spread as hashes are, records are of several lengths."""
    for i in range(count):
        yield int.from_bytes(hashlib.md5(b"%d" % i).digest(), "big"), i


def encode(i):
    return b"%d," % i * (i % 7 + 1)


def expected(count=60):
    return [encode(i) for _, i in sorted(examples(count))]


def make(folder, **kwargs):
    return Spool(folder, **{"commit_bytes": 100, **kwargs})


def test_records_come_out_by_their_keys(tmp_path):
    spool = make(tmp_path)
    spool.fill(examples(), encode)
    assert spool.is_complete and spool.num_examples == 60
    assert spool.record_bytes == sum(map(len, expected()))
    assert list(spool.records(0, 60)) == expected()
    for start, stop in ((0, 1), (7, 7), (13, 40), (59, 60)):
        assert list(spool.records(start, stop)) == expected()[start:stop]


def test_released_buckets_are_those_that_nobody_needs(tmp_path):
    spool = make(tmp_path)
    spool.fill(examples(), encode)
    for start, stop in itertools.pairwise(range(0, 61, 10)):
        assert list(make(tmp_path).records(start, stop)) == expected()[start:stop]
        spool.release(stop)
    assert not list(tmp_path.glob("bucket*"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_any_call_it_goes_on(tmp_path, monkeypatch, call):
    true_call, left = getattr(os, call), 0

    def kill_at_last(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return true_call(*args, **kwargs)

    monkeypatch.setattr(os, call, kill_at_last)
    encoded = []
    for attempt in itertools.count(1):
        left = attempt
        spool = make(tmp_path)
        before = spool.num_examples
        try:
            spool.fill(examples(), lambda i: encoded.append(i) or encode(i))
        except Killed:
            assert make(tmp_path).num_examples >= before
        else:
            break
    assert attempt > 3
    assert len(encoded) < 60 * attempt / 2  # It did not begin again each time.
    assert list(make(tmp_path).records(0, 60)) == expected()


def test_other_examples_are_refused(tmp_path):
    stopped = itertools.chain(examples(40), (1 // 0 for _ in range(1)))
    with pytest.raises(ZeroDivisionError):
        make(tmp_path).fill(stopped, encode)
    assert 0 < make(tmp_path).num_examples <= 40
    with pytest.raises(SpoolError, match="not those of an earlier run"):
        make(tmp_path).fill(reversed(list(examples())), encode)
    with pytest.raises(SpoolError, match=r"3 examples, where an earlier run had taken in"):
        make(tmp_path).fill(examples(3), encode)
    make(tmp_path).fill(examples(), encode)
    assert list(make(tmp_path).records(0, 60)) == expected()


def test_a_damaged_bucket_is_found(tmp_path):
    spool = make(tmp_path)
    spool.fill(examples(), encode)
    bucket = sorted(tmp_path.glob("bucket*"))[3]
    bucket.write_bytes(bucket.read_bytes()[:-1])
    with pytest.raises(SpoolError, match=bucket.name):
        list(spool.records(0, 60))
    bucket.unlink()
    with pytest.raises(SpoolError, match=bucket.name):
        list(make(tmp_path).records(0, 60))


@pytest.mark.parametrize("harm", ["cut", "remove", "journal"])
def test_damage_is_found_before_more_is_written(tmp_path, harm):
    stopped = itertools.chain(examples(40), (1 // 0 for _ in range(1)))
    with pytest.raises(ZeroDivisionError):
        make(tmp_path).fill(stopped, encode)
    spool = make(tmp_path)
    for bucket in tmp_path.glob("bucket*"):
        if harm == "cut":
            bucket.write_bytes(bucket.read_bytes()[:-1])
        elif harm == "remove":
            bucket.unlink()
    if harm == "journal":
        (tmp_path / "journal.json").write_text('{"examples": 3, "buckets": 7}')
        with pytest.raises(SpoolError, match=r"journal.json.*buckets"):
            make(tmp_path)
    else:
        same_buckets = ((key, i) for key, i in itertools.chain(examples(40), examples(40)))
        with pytest.raises(SpoolError, match="missing or cut short"):
            spool.fill(same_buckets, encode)


def test_no_examples_are_no_dataset(tmp_path):
    for _ in range(2):
        with pytest.raises(SpoolError, match="has no examples"):
            make(tmp_path).fill([], encode)
        assert not make(tmp_path).is_complete


def test_two_examples_of_one_key_are_refused(tmp_path):
    spool = make(tmp_path)
    spool.fill([(5, 1), (9, 2), (5, 3)], encode)
    with pytest.raises(SpoolError, match="same key"):
        list(spool.records(0, 3))
