"""Batches that are read ahead."""

import numpy as np

import toy_task
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.feed import Feed


def test_feed_reads_ahead_but_remembers_what_was_taken():
    config = toy_task.config_of()
    mesh = sharding.make_mesh(config.mesh)
    with Feed(toy_task.make_iterator(config), mesh) as feed:
        whole = []
        for _ in range(3):
            whole.append(np.asarray(feed.take()["x"]))
            feed.prefetch()
            feed.prefetch()  # Once is enough.
        state, skipped = feed.state, feed.skipped
        whole += [np.asarray(feed.take()["x"]) for _ in range(2)]
    with Feed(toy_task.make_iterator(config), mesh) as feed:
        feed.set_state(state, skipped)
        again = [np.asarray(feed.take()["x"]) for _ in range(2)]
    np.testing.assert_array_equal(again, whole[3:])
