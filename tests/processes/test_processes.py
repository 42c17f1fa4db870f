"""Two processes of four devices against one of eight; and a run that is killed many times.

The two processes are launched once, and so is the one; each does all that the tests look at.
"""

import json
import multiprocessing
import pathlib
import random
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import numpy as np
import pytest

import children
import toy_task
from detailflow_jax import train
from detailflow_jax.evaluate import training
from detailflow_jax.evaluate.features import FeatureExtractor, FeatureNetwork
from detailflow_jax.inference import extract_codes, generate
from detailflow_jax.runtime import distributed, sharding
from detailflow_jax.runtime.checkpoint import Checkpoints, restore_params, save_params
from detailflow_jax.runtime.config import load_config, write_config
from detailflow_jax.runtime.feed import Feed
from detailflow_jax.tasks import TrainState, make_task

ROOT = pathlib.Path(__file__).parents[2]
CODES = ["--config.model.num_tokens=8", "--config.model.group_size=8"]
TOKENIZER = [*CODES, "--config.model.scan=False", "--config.losses.align.weight=0.0"]
TOKENIZER += [
    f"--config.model.{part}.{size}"
    for part in ("encoder", "decoder")
    for size in ("width=32", "depth=1", "num_heads=2", "mlp_dim=32")
]
GENERATOR = ["--config=configs/generator.py:digits:runlocal", "--config.tensorboard=False"]
GENERATOR += ["--config.model.width=32", "--config.model.depth=1", "--config.model.multiple_of=8"]
GENERATOR += [*CODES, "--config.mesh.fsdp=4"]
GENERATOR += ["--config.log_every=1", "--config.checkpoint_every=7"]
STEPS, LEAVE_AFTER = 40, 9
RUNS = ("run", "undisturbed")
KILLS = 20

pytestmark = pytest.mark.full  # test_process_killed.py and test_train_loop.py have short ones.


def launch(folder: pathlib.Path, *arguments: str) -> subprocess.Popen:
    program = ["--", "python", __file__, folder]
    return children.start(ROOT / "launch" / "local.sh", *arguments, *program)


def steps_logged(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def save_networks(folder: pathlib.Path) -> None:
    """Workdirs of a tokenizer and a generator that were never trained."""
    for name, config in (
        ("tok", load_config("configs/tokenizer.py:digits:runlocal", TOKENIZER)),
        ("gen", load_config("configs/generator.py:digits:runlocal", GENERATOR[2:])),
    ):
        task, mesh = make_task(config), sharding.make_mesh({}, jax.devices()[:1])
        params = sharding.create_sharded(task.init, jax.random.key(1), mesh).params
        write_config(config, folder / name)
        save_params(folder / name, jax.device_get(params))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, output) of two processes that got SIGTERM while they trained, and left."""
    folder = tmp_path_factory.mktemp("processes")
    save_networks(folder)
    child = launch(folder, "-n", "2", "--cpu-devices", "4")
    deadline = time.monotonic() + 300
    while steps_logged(folder / "run") < LEAVE_AFTER and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.02)
    child.terminate()
    output = children.finish(child)
    assert child.returncode == train.PREEMPTED, output
    return folder, output


@pytest.fixture(scope="module")
def one(two):
    """(folder, output) of one process that does the same undisturbed, then resumes their run."""
    folder, _ = two
    child = launch(folder, "--cpu-devices", "8")
    output = children.finish(child)
    assert child.returncode == train.FINISHED, output
    return folder, output


def facts(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_both_leave_with_a_checkpoint_of_the_same_step(two):
    folder, output = two
    saved = [line.split("saved step ")[1] for line in output.splitlines() if "saved step" in line]
    assert len(saved) == 2 and saved[0] == saved[1], output
    step = int(saved[0].split(";")[0])
    assert LEAVE_AFTER <= step < STEPS
    assert (folder / "run" / "checkpoints" / str(step)).exists()


def test_the_run_goes_on_in_one_process_and_ends_as_if_nothing_had_happened(one):
    folder, output = one
    assert "resuming after step" in output
    step = f"checkpoints/{STEPS}"
    data = [json.loads((folder / run / step / "data" / "metadata").read_text()) for run in RUNS]
    assert data[0] == data[1]
    for ema in (False, True):
        runs = [restore_params(folder / run, ema=ema) for run in RUNS]
        for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
            # Sums over eight devices have another order within one process than across two.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    lines = [(folder / run / "metrics.jsonl").read_text().splitlines() for run in RUNS]
    a, b = ([json.loads(line) for line in run] for run in lines)
    assert [line["step"] for line in a] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-5)
    # Those of the first steps were made by two processes.
    scores = [[x["score/ema/fid_of_11"] for x in lines if x["step"] % 4 == 0] for lines in (a, b)]
    assert len(scores[0]) == STEPS // 4
    np.testing.assert_allclose(*scores, rtol=1e-3)


def test_figures_are_those_of_one_process(one):
    folder, _ = one
    drawn = [dict(np.load(folder / f"figures_{name}.npz")) for name in ("2_0", "2_1", "1_0")]
    assert drawn[0].keys() == {"reconstructions", "coarse_to_fine"}
    for name, picture in drawn[2].items():
        np.testing.assert_array_equal(drawn[0][name], drawn[1][name])
        assert len(np.unique(picture)) > 10
        assert np.abs(drawn[0][name].astype(int) - picture).max() <= 1, name


def test_extraction_writes_the_same_files(one):
    folder, _ = one
    files = sorted((folder / "codes_2").iterdir())
    assert len([file for file in files if file.suffix == ".array_record"]) == 5
    assert [file.name for file in files] == sorted(p.name for p in (folder / "codes_1").iterdir())
    for file in files:
        assert file.read_bytes() == (folder / "codes_1" / file.name).read_bytes(), file.name


def test_samples_are_the_same(one):
    folder, _ = one
    a, b = (np.load(folder / f"samples_{count}" / "samples.npz") for count in (1, 2))
    np.testing.assert_array_equal(a["labels"], b["labels"])
    assert a["arr_0"].shape == b["arr_0"].shape == (9, 32, 32, 3)
    assert len(np.unique(a["arr_0"], axis=0)) == 9
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1


def test_what_damages_one_process_is_passed_over_by_both(two):
    folder, _ = two
    for process in range(2):
        found = facts(folder, f"facts_2_{process}")
        assert found["restored"] == 1 and found["same"]
    assert (folder / "damaged" / "checkpoints" / "2.damaged").exists()


def test_a_tensor_axis_across_processes_gives_both_the_same_rows(two):
    folder, _ = two
    for process in range(2):
        found = facts(folder, f"facts_2_{process}")
        assert found["shares"] == {"8,1,1": [process, 2], "2,2,2": [process, 2], "1,1,8": [0, 1]}
        assert found["slices"] == [[0] * 4, [1] * 4]
        assert found["skipped"] == 5


# ----------------------------------------------------------------------------------------- kills


def wait_for(child, condition) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert child.is_alive(), f"left with {child.exitcode}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_kills_lose_nothing(tmp_path):
    """Every second one in the middle of a save."""
    total = 40 + 16 * KILLS
    slow, fast = (
        {"total_steps": total, "log_every": 5, "checkpoint_every": 5, "delay": delay}
        for delay in (0.03, 0.0)
    )
    context = multiprocessing.get_context("forkserver")  # Imports once for all.
    context.set_forkserver_preload(["toy_task"])
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    checkpoints, saved, chance = workdir / "checkpoints", [], random.Random()

    def start(folder, fields):
        child = context.Process(target=toy_task.train_for, args=(str(folder), fields))
        child.start()
        return child

    for life in range(KILLS):
        child = start(workdir, slow)
        before = steps_logged(workdir)
        wait_for(child, lambda before=before: steps_logged(workdir) > before)
        time.sleep(chance.uniform(0, 0.15))
        if life % 2:
            wait_for(child, lambda: any(checkpoints.glob("*tmp*")))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        whole = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()]
        saved.append(max(whole, default=0))
    assert saved == sorted(saved) and saved[-1] < total

    for folder, fields in ((workdir, slow), (undisturbed, fast)):
        child = start(folder, fields)
        child.join(240)
        assert child.exitcode == 0
    states = [jax.tree.leaves(final_state(run, total)) for run in (workdir, undisturbed)]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(workdir) == losses(undisturbed)


def losses(workdir: pathlib.Path) -> list[tuple]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["skipped"]) for line in lines]


def final_state(workdir, total):
    task = toy_task.make_task(toy_task.get_config())
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    abstract = sharding.abstract_state(task.init, jax.random.key(0), mesh)
    with Checkpoints(workdir, 2) as checkpoints:
        restored = checkpoints.restore(abstract.replace(frozen={}))
    assert restored.step == total
    return restored.state


# ---------------------------------------------------------------------------------- the processes


def draw(folder: pathlib.Path, name: str) -> None:
    config = load_config("configs/tokenizer.py:digits:runlocal", TOKENIZER)
    task, mesh = make_task(config), sharding.make_mesh({"fsdp": 4})
    side = config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (16, side, side, 3), np.uint8)
    block, blocks = sharding.batch_share(mesh)
    rows = np.split(images, blocks)[block]
    with sharding.use(mesh):
        state = sharding.create_sharded(task.init, jax.random.key(0), mesh)
        figures = task.figures(state, sharding.global_batch({"image": rows}, mesh))
        figures = jax.tree.map(sharding.to_host, figures)
    np.savez(folder / f"figures_{name}.npz", **figures)


def restore_damaged(folder: pathlib.Path) -> dict:
    """A checkpoint whose part of process 1 is damaged, as both processes see it."""

    def init(key: jax.Array) -> TrainState:  # Small arrays are in files that all share.
        weights = nn.LogicallyPartitioned(jax.random.normal(key, (64, 4096)), ("embed", None))
        return TrainState(step=np.int32(0), params={"w": weights}, opt_state={})

    mesh = sharding.make_mesh({"fsdp": 8})
    states = [sharding.create_sharded(init, jax.random.key(i), mesh) for i in (1, 2)]
    with Checkpoints(folder / "damaged", 5) as checkpoints:
        for step, state in enumerate(states, 1):
            checkpoints.save(step, state, {}, {})
    if jax.process_index() == 1:
        state = folder / "damaged" / "checkpoints" / "2" / "state"
        for file in state.glob("ocdbt.process_1/d/*"):
            file.write_bytes(file.read_bytes()[:5000])
    sharding.sync_processes("damaged")
    with Checkpoints(folder / "damaged", 5) as checkpoints:
        restored = checkpoints.restore(sharding.abstract_state(init, jax.random.key(0), mesh))
    pairs = zip(jax.tree.leaves(restored.state), jax.tree.leaves(states[0]), strict=True)
    same = all(np.array_equal(sharding.to_host(a), sharding.to_host(b)) for a, b in pairs)
    return {"restored": restored.step, "same": same}


def count_skipped() -> int:
    """Processes 0 and 1 skip one and two images; two more were skipped before."""
    one = {"x": np.zeros((4, 1), np.float32), "skipped": np.array([jax.process_index() + 1])}

    class Rows:
        __next__ = lambda self: dict(one)  # noqa: E731
        get_state = set_state = lambda self, state=None: {}

    feed = Feed(Rows(), sharding.make_mesh({}))
    feed.set_state({}, 2)
    feed.take()
    return feed.skipped


def look(folder: pathlib.Path) -> dict:
    shapes = ((8, 1, 1), (2, 2, 2), (1, 1, 8))
    meshes = [sharding.make_mesh(dict(zip(sharding.AXES, s, strict=True))) for s in shapes]
    slices = sharding.make_mesh({"data": 2, "fsdp": 4, "slices": 2}).devices.reshape(2, 4)
    return {
        "shares": {
            ",".join(map(str, mesh.devices.shape)): sharding.batch_share(mesh) for mesh in meshes
        },
        "slices": [[device.process_index for device in row] for row in slices],
        "skipped": count_skipped(),
        **restore_damaged(folder),
    }


def thumbnails(path: str | None, batch_size: int, **_) -> FeatureExtractor:
    """In Inception's place: the colours of an image's sixteenths."""

    def apply(params, images):
        parts = images.astype(np.float32).reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4))
        parts = parts.reshape(len(images), -1)
        return {"pool": parts, "spatial": parts, "logits": parts}

    return FeatureExtractor(FeatureNetwork(apply, {}, "thumbnails"), batch_size=batch_size)


def work(folder: pathlib.Path) -> int:
    distributed.start()
    count = jax.process_count()
    name = f"{count}_{jax.process_index()}"
    if count == 2:
        (folder / f"facts_{name}.json").write_text(json.dumps(look(folder)))
    draw(folder, name)
    tok, gen = f"--tokenizer={folder / 'tok'}", f"--generator={folder / 'gen'}"
    codes = [tok, f"--out={folder}/codes_{count}", "--crops=center", "--shard_size=80"]
    samples = [tok, gen, "--labels=0-2", "--per_class=3", "--batch_size=8"]
    if code := extract_codes.main([*codes, "--source=digits:test"]):
        return code
    if code := generate.main([*samples, f"--out={folder}/samples_{count}"]):
        return code
    arguments = [*GENERATOR, f"--config.data.source=codes:{folder}/codes_2"]
    arguments += [f"--config.total_steps={STEPS}", "--config.score.every=4"]
    arguments += ["--config.score.num_samples=11", "--config.score.batch_size=8"]
    arguments += ["--config.score.reference=digits:test", f"--config.score.decoder={folder}/tok"]
    training.load_extractor = thumbnails
    if count == 2:
        take = Feed.take
        Feed.take = lambda self: (time.sleep(0.1), take(self))[1]  # Time for a signal.
        return train.main([*arguments, f"--workdir={folder}/run"])
    return max(train.main([*arguments, f"--workdir={folder}/{run}"]) for run in RUNS)


if __name__ == "__main__":
    distributed.leave(work(pathlib.Path(sys.argv[1])))
