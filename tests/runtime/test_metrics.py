"""What a run writes of its metrics."""

import json

import numpy as np

import toy_task
from detailflow_jax.runtime.metrics import Averages, MetricWriter


def test_averages_go_on_exactly_after_a_stop():
    losses = [np.float32(x) for x in np.random.default_rng(0).normal(size=9)]
    whole, first = Averages(), Averages()
    for step, loss in enumerate(losses):
        whole.add(step, {"loss": loss})
    for step, loss in enumerate(losses[:4]):
        first.add(step, {"loss": loss})
    first.fetch()
    second = Averages(json.loads(json.dumps(first.totals)))
    for step, loss in enumerate(losses[4:]):
        second.add(step, {"loss": loss})
    assert second.take_means() == whole.take_means()
    assert whole.totals == {}


def test_tensorboard_files_hold_scalars_and_figures(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    with MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.scalars(3, {"loss": 0.5, "strange": float("inf")})
        writer.figures(3, {"strip": np.zeros((4, 6, 3), np.uint8)})
    assert toy_task.metrics_of(tmp_path) == [{"step": 3, "loss": 0.5, "strange": None}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    tags = {v.tag: e.step for e in EventFileLoader(str(events)).Load() for v in e.summary.value}
    assert tags == {"loss": 3, "strange": 3, "strip": 3}


def test_tensorboard_shows_a_killed_stretch_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_after, steps in (0, (1, 2, 3, 4)), (2, (3,)), (2, (3, 4, 5)):
        with MetricWriter(tmp_path, tensorboard=True, step=resumed_after) as writer:
            for step in steps:
                writer.scalars(step, {"loss": float(step)})
                writer.figures(step, {"strip": np.zeros((4, 6, 3), np.uint8)})
    folder = str(tmp_path / "tensorboard")
    events = EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Images("strip")] == [1, 2, 3, 4, 5]
