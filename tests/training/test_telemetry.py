"""What a run tells while it runs: its times across a restart, a profile, Weights & Biases."""

import json
import pathlib
import socket
import struct

import jax
import numpy as np
import pytest

import toy_task
from detailflow_jax import train
from detailflow_jax.runtime import extras
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.profiler import Profiler
from detailflow_jax.runtime.wandb_run import WandbRun

BROKEN, SAVED, STEPS = 9, 6, 12


class PowerCut(BaseException):
    """Ends a run before it can save."""


class BreaksAfter:
    """An iterator that gives some batches until the power is cut."""

    def __init__(self, iterator, batches: int):
        self._iterator, self._left = iterator, batches

    def __next__(self):
        self._left -= 1
        if self._left < 0:
            raise PowerCut
        return next(self._iterator)

    def __getattr__(self, name):
        return getattr(self._iterator, name)


def config_of(**fields):
    config = toy_task.get_config()
    config.update({"total_steps": STEPS, "log_every": 1, "figures_every": 4, **fields})
    return config


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    """The workdir of a run that was cut off in step 10, after saving step 6, and went on."""
    workdir = tmp_path_factory.mktemp("told") / "run"
    config = config_of(
        tensorboard=True,
        wandb={"project": "digits"},
        profile={"start": 2, "steps": 2, "port": 0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        broken = BreaksAfter(toy_task.make_iterator(config), BROKEN)
        with pytest.raises(PowerCut):
            train.train(config, workdir, toy_task.make_task(config), broken)
        toy_task.run(config, workdir)
    extras.require("wandb").teardown()
    return workdir


def lines_of(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def shares(line: dict) -> dict[str, float]:
    return {k.rpartition("/")[2]: v for k, v in line.items() if k.startswith("perf/time/")}


def test_metrics_say_where_the_time_went(restarted):
    lines = lines_of(restarted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["perf/goodput"] + sum(shares(line).values()) == pytest.approx(1)
        assert 0 < line["perf/step_p50"] <= line["perf/step_max"]
        assert 0 <= line["perf/input_wait"] <= 1
    # Products of a step: 8 rows, the frozen mix forward, two layers forward and backward, without
    # the gradient by the input.
    mix, up, down = toy_task.WIDTH**2, toy_task.WIDTH * toy_task.HIDDEN, toy_task.HIDDEN * 8
    flops = 2 * 8 * (mix + 2 * up + 3 * down)
    done = lines[-1]["perf/tflops"] * lines[-1]["perf/step_p50"] * jax.device_count()
    assert done * 1e12 == pytest.approx(flops)


def test_restart_and_lost_steps_count(restarted):
    lines = lines_of(restarted)
    before, after = lines[:SAVED], lines[SAVED:]
    assert not any(shares(line).keys() & {"lost", "restart"} for line in before)
    assert all(shares(line)["lost"] > 0 and shares(line)["restart"] > 0 for line in after)
    assert {"start", "restore", "compile", "save", "figures"} <= shares(after[-1]).keys()
    account = json.loads((restarted / "clock.json").read_text())
    assert account["finished"]
    assert sum(account["seconds"].values()) >= lines[-1]["seconds"]
    log = (restarted / "log.txt").read_text()
    assert "goodput" in log and "% in steps, " in log


def test_tensorboard_has_the_same_figures(restarted):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    goodput = {}  # Of the steps that were done twice, the later.
    for file in sorted((restarted / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "perf/goodput":
                    goodput[event.step] = value.tensor.float_val[0]
    assert goodput == {x["step"]: np.float32(x["perf/goodput"]) for x in lines_of(restarted)}


def test_profile_is_of_the_steps_asked_for(restarted):
    first, second = sorted((restarted / "profile").rglob("*.xplane.pb"))  # One of each part.
    for path, steps in (first, {3, 4}), (second, {SAVED + 2, SAVED + 3}):
        profile = jax.profiler.ProfileData.from_file(str(path))
        events = [e for plane in profile.planes for line in plane.lines for e in line.events]
        stats = [dict(event.stats) for event in events if event.name == "train"]
        assert {int(stat["step_num"]) for stat in stats} == steps


def wandb_records(path: pathlib.Path):
    """The records of a local file of wandb: blocks of a LevelDB log, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, payload = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        payload += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield wandb_internal_pb2.Record.FromString(payload)
            payload = b""


def history(path: pathlib.Path) -> dict[int, dict]:
    """{step: {name: value}} of a local file of wandb."""
    rows = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items}
            rows.setdefault(record.history.step.num, {}).update(row)
    return rows


def test_weights_and_biases_gets_the_same(restarted):
    first, second = sorted((restarted / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name == f"run-{(restarted / 'wandb_id').read_text()}.wandb"
    assert list(history(first)) == list(range(1, BROKEN + 1))
    rows = history(second)
    assert list(rows) == list(range(SAVED + 1, STEPS + 1))
    for line in lines_of(restarted)[SAVED:]:
        row = rows[line.pop("step")]
        finite = {name: value for name, value in line.items() if value is not None}
        assert {name: row[name] for name in finite} == finite
    assert rows[STEPS]["inputs/_type"] == "image-file"
    [run] = [r.run for r in wandb_records(second) if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("digits", "run")
    config = {x.key: json.loads(x.value_json) for x in run.config.update}
    assert config["total_steps"] == STEPS and config["optim"] == {"lr": 0.01}


def test_a_run_goes_on_when_weights_and_biases_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = WandbRun(tmp_path, "digits", "run", {})
    extras.require("wandb").teardown()  # Its service is gone, as after a kill.
    run.scalars(1, {"loss": 1.0})
    run.scalars(2, {"loss": 1.0})
    run.close()
    assert caplog.text.count("training goes on without it") == 1


def test_weights_and_biases_without_a_login_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="wandb login"):
        WandbRun(tmp_path, "digits", "run", {})
    extras.require("wandb").teardown()


def test_profiler_answers_on_its_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"profile\.port.*{port}"):
            Profiler(tmp_path, port=port)
    with Profiler(tmp_path, port=port):
        socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert not any(tmp_path.iterdir())


def test_fields_are_checked_where_they_are(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.profile\.steps=-1"):
        toy_task.run(config_of(profile={"start": 0, "steps": -1, "port": 0}), tmp_path)
    with pytest.raises(ConfigError, match=r"config\.wandb\.project"):
        toy_task.run(config_of(wandb={"project": 3}), tmp_path)
