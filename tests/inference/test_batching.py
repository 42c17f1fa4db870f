"""Batches: padded, placed, run, cut and put together again."""

import jax
import numpy as np
import pytest

from detailflow_jax.inference.batching import in_batches, over_processes, split_count
from detailflow_jax.inference.errors import InputError
from detailflow_jax.runtime import sharding


@pytest.mark.parametrize("count", [1, 4, 7, 8])
@pytest.mark.parametrize(("whole", "meshed"), [(False, False), (True, False), (True, True)])
def test_any_number_of_rows_in_batches_of_one_size(count, whole, meshed):
    mesh = sharding.make_mesh({}) if meshed else None
    x, y = np.arange(3 * count).reshape(count, 3), np.arange(count)
    sizes = set()

    def function(x, y):
        sizes.add(len(x))
        if meshed:
            assert len(x.sharding.device_set) == len(jax.devices())
        return {"sum": x.sum(1) + y, "x": x}

    found = in_batches(function, 4, x, y, mesh=mesh, whole=whole)
    np.testing.assert_array_equal(found["sum"], x.sum(1) + y)
    np.testing.assert_array_equal(found["x"], x)
    parts = split_count(mesh)
    assert sizes == {-(-(4 if whole else min(4, count)) // parts) * parts}


def test_no_rows():
    assert in_batches(lambda x: 2 * x, 4, np.zeros((0, 3))).shape == (0, 3)


def test_each_batch_is_finished_before_they_are_put_together():
    seen = []
    found = in_batches(lambda x: x, 2, np.arange(5), finish=lambda x: seen.append(len(x)) or -x)
    assert seen == [2, 2, 2] and found.tolist() == [0, -1, -2, -3, -4]


def test_what_cannot_be_batched():
    with pytest.raises(InputError, match="found 2 and 3 rows"):
        in_batches(lambda x, y: x, 2, np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match="batch_size=0"):
        in_batches(lambda x: x, 0, np.zeros(2))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_processes_share_the_rows(monkeypatch, index):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(sharding, "gather_processes", lambda x: x)
    found = over_processes(
        lambda first, own: {"first": np.full(3, first), "own": own}, np.arange(7)
    )
    assert found["first"].tolist() == [3 * index] * 3
    assert found["own"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 6, 6]][index]
