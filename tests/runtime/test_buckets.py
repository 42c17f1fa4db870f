"""Files in a bucket, and who holds a workdir there; against a server that speaks its protocol."""

import contextlib
import glob
import io
import json
import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import bucket_server
import children
import toy_task
from detailflow_jax import train
from detailflow_jax.data.folders import list_folder
from detailflow_jax.evaluate.samples import NpzImages
from detailflow_jax.runtime import files, workdir
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.errors import BucketError, ConfigError, WriteError


@pytest.fixture(scope="module")
def bucket():
    with bucket_server.shared() as found:
        yield found


@pytest.fixture(autouse=True)
def without_faults(bucket):
    yield
    bucket.proxy.heal()


@pytest.mark.parametrize("name", ["file", "a b/ä ö/файл #1?.json", "run[1]/a*"])
def test_a_file_is_written_read_and_removed(bucket, name):
    place = bucket.path(name)
    assert not files.exists(place)
    files.write_atomically(place, b"content")
    assert bucket.read(name) == b"content"
    assert files.exists(place) and files.size(place) == 7
    assert files.read_bytes(place) == b"content"
    with files.open_file(place) as file:
        file.seek(3)
        assert file.read() == b"tent"
    files.remove(place)
    files.remove(place)
    assert not files.exists(place)


def test_an_address_has_one_name(bucket):
    """As what `$B/codes` gives where B ends in a slash, or what ends in several."""
    odd = f"{bucket.path('slashes')}//./codes"
    files.make_folder(f"{odd}//")
    files.write_atomically(f"{odd}//a.json", b"{}")
    assert bucket.names("slashes") == ["slashes/codes/a.json"]
    assert files.read_json(f"{odd}/a.json") == {} and files.sizes(f"{odd}//") == {"a.json": 2}
    files.write_all({f"{odd}//b": b"1"})
    assert list_folder(odd).others == files.names(odd)[:2] == ["a.json", "b"]
    files.remove(f"{odd}//a.json")
    assert bucket.names("slashes") == ["slashes/codes/b"]


@contextlib.contextmanager
def compiled_programs_in(place):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", place)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_a_bucket(bucket):
    hits = []

    def listen(event, **_):
        hits.append(event == "/jax/compilation_cache/cache_hits")

    jax.monitoring.register_event_listener(listen)
    try:
        with compiled_programs_in(bucket.path("compiled")):
            x = np.arange(3.0)
            for seen in (0, 1):
                assert jax.jit(lambda x: x * 3 + 1)(x)[1] == 4
                assert sum(hits) == seen
            assert any("-cache" in name for name in files.names(bucket.path("compiled")))
    finally:
        jax.monitoring.unregister_event_listener(listen)


@pytest.mark.parametrize(
    ("place", "fault", "told"),
    [
        ("gs://no-such-bucket/compiled", None, "there is no such bucket"),
        ("gs://test-bucket/compiled", 403, "may it read and write there"),
        ("gs:/test-bucket/compiled", None, "expected a local path or an address such as gs://"),
    ],
)
def test_a_place_for_compiled_programs_that_cannot_be_used(
    bucket, tmp_path, monkeypatch, capsys, place, fault, told
):
    """It is an error before any work."""
    monkeypatch.chdir(tmp_path)
    bucket.proxy.fault = lambda method, path: fault
    before = bucket.names()
    arguments = [f"--config={toy_task.__file__}", "--workdir=run"]
    with compiled_programs_in(place):
        assert train.main(arguments, toy_task.run) == 2
    assert f"JAX_COMPILATION_CACHE_DIR={place}" in (error := capsys.readouterr().err)
    assert told in error
    assert not os.listdir() and bucket.names() == before


def test_large_files_and_listings(bucket):
    with files.atomic_path(bucket.path("folder/large")) as temporary:
        temporary.write_bytes(bytes(6 << 20))
    with pytest.raises(KeyError), files.atomic_file(bucket.path("folder/failed")) as file:
        file.write(b"half")
        raise KeyError
    assert files.sizes(bucket.path("folder")) == {"large": 6 << 20}
    assert files.names(bucket.path("folder/")) == ["large"]
    assert files.is_dir(bucket.path("folder")) and not files.is_dir(bucket.path("none"))


def test_a_bucket_that_fails_in_the_middle_of_a_file_is_no_damage(bucket):
    images = np.random.default_rng(0).integers(0, 256, (200, 200, 200, 3), np.uint8)
    content = io.BytesIO()
    np.savez(content, arr_0=images)
    bucket.write("images.npz", content.getvalue())
    read = NpzImages(bucket.path("images.npz")).read
    np.testing.assert_array_equal(read(0, 3), images[:3])
    bucket.proxy.fault = lambda method, path: 400
    with pytest.raises(BucketError, match=r"cannot read gs://.*images.npz"):
        read(190, 200)


@pytest.mark.parametrize("fault", [503, bucket_server.CUT])
def test_a_passing_fault_is_tried_again(bucket, fault):
    faults = [fault]
    bucket.proxy.fault = lambda method, path: faults.pop() if faults else None
    files.write_atomically(bucket.path("again"), bytes(1 << 20))
    assert not faults and len(bucket.read("again")) == 1 << 20


def test_a_bucket_that_refuses_or_is_missing_is_the_users_to_mend(bucket):
    with pytest.raises(ConfigError, match="there is no such bucket"):
        files.make_folder("gs://no-such-bucket/run")
    bucket.proxy.fault = lambda method, path: 403
    with pytest.raises(ConfigError, match="may it read and write there"):
        files.make_folder(bucket.path("run"))


@pytest.mark.parametrize(
    "place",
    [
        "",
        "gs:/bucket/run",
        "gs://",
        "gs:bucket/run",
        " gs://b/run",
        "/home/GS:/b",
        "http://host/run",
    ],
)
def test_what_is_no_path_is_refused(place):
    with pytest.raises(ConfigError, match="expected a local path"):
        files.path(place)


def test_local_paths():
    assert files.path("~/run/") == files.path(os.path.expanduser("~/run"))
    with pytest.raises(ConfigError, match="--out=gs://b/x: expected a path on this machine"):
        files.local_path("gs://b/x", "--out")


@pytest.fixture
def hasty(monkeypatch):
    for name, seconds in {"DEAD_AFTER": 1.0, "RENEW": 0.1, "_SETTLE": 0.1}.items():
        monkeypatch.setattr(workdir, name, seconds)


def test_a_workdir_in_a_bucket_is_held_by_one(bucket, hasty):
    place = bucket.path("runs/ä b")
    with workdir.open_workdir(place) as held:
        (held.folder / "log.txt").write_text("one\n")
        held.upload()
        assert bucket.read("runs/ä b/log.txt") == b"one\n"
        with (
            pytest.raises(ConfigError, match="another process is at work in gs://"),
            workdir.open_workdir(place),
        ):
            pass
        with (held.folder / "log.txt").open("a") as file:
            file.write("two\n")
    assert bucket.names("runs/ä b/") == ["runs/ä b/log.txt"]
    with workdir.open_workdir(place) as held:
        assert (held.folder / "log.txt").read_text() == "one\ntwo\n"


def test_a_workdir_whose_checkpoints_could_not_be_removed_is_refused(bucket):
    with (
        pytest.raises(ConfigError, match=r"without any of"),
        workdir.open_workdir(bucket.path("runs/tok[1]")),
    ):
        pass
    assert bucket.names("runs/tok") == []


def test_the_mark_of_a_dead_holder_is_taken_over(bucket, hasty):
    other = {"token": "x", "host": "elsewhere", "pid": 3, "renewed": 0}
    bucket.write("dead/.lock", json.dumps(other).encode())
    with workdir.open_workdir(bucket.path("dead")) as held:
        held.upload()
        bucket.write("dead/.lock", json.dumps(other | {"token": "y"}).encode())
        for _ in range(100):
            try:
                held.upload()
            except ConfigError:
                break
            held._leave.wait(0.05)
        with pytest.raises(ConfigError, match="process 3 on elsewhere"):
            held.upload()
    assert json.loads(bucket.read("dead/.lock"))["token"] == "y"


def test_a_killed_run_leaves_no_folder_behind_and_one_in_use_stays(bucket):
    def spools() -> set[str]:
        return set(glob.glob(os.path.join(tempfile.gettempdir(), "detailflow-*")))

    before = spools()
    with workdir.open_workdir(bucket.path("spool")):
        (other,) = spools() - before
    os.mkdir(other)
    lock = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    lock += "; print(flush=True); input()"
    command = [sys.executable, "-c", lock, os.path.join(other, ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with workdir.open_workdir(bucket.path("spool")):
            assert os.path.isdir(other)
        child.kill()
    with workdir.open_workdir(bucket.path("spool")):
        assert not os.path.exists(other)


def same_bits(*workdirs) -> None:
    states = [jax.tree.leaves(restore_params(workdir)) for workdir in workdirs]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [("gs://no-such-bucket/run", None, "no such bucket"), ("", 403, "may it read and write there")],
)
def test_a_run_does_not_start_where_it_cannot_save(bucket, capsys, place, status, message):
    bucket.proxy.fault = lambda method, path: status
    options = [f"--config={toy_task.__file__}", f"--workdir={place or bucket.path('refused')}"]
    assert train.main(options, run=toy_task.run) == train.UNUSABLE
    assert message in capsys.readouterr().err and not bucket.names("refused")


@pytest.mark.full
@pytest.mark.parametrize("status", [503, 403])
def test_a_long_outage_ends_a_run_that_resumes_without_loss(bucket, tmp_path, status):
    """The bucket fails while a checkpoint is written, then while one is read."""
    config, workdir = toy_task.get_config(), bucket.path(f"outage {status}")
    config.update(total_steps=18, checkpoint_every=6)
    toy_task.run(config, str(tmp_path / "run"))
    bucket.proxy.fault = lambda method, path: status if "checkpoints/12/clock" in path else None
    with pytest.raises(WriteError, match="does the bucket answer") as failed:
        toy_task.run(config, workdir)
    assert failed.value.exit_code == 1
    bucket.proxy.fault = lambda method, path: status if "%2F6%2Fclock" in path else None
    with pytest.raises(BucketError, match=r"cannot read gs:.*checkpoints/6") as failed:
        toy_task.run(config, workdir)
    assert failed.value.exit_code == 1
    bucket.proxy.heal()
    toy_task.run(config, workdir)
    assert b"resuming after step 6 of 18" in bucket.read(f"outage {status}/log.txt")
    same_bits(tmp_path / "run", workdir)


@pytest.mark.full
def test_a_run_in_a_bucket_is_killed_and_ends_with_the_bits_of_a_local_one(bucket, tmp_path):
    config = toy_task.get_config()
    toy_task.run(config, str(tmp_path / "run"))
    program = toy_task.__file__
    options = [program, f"--config={program}", f"--workdir={bucket.path('killed/')}"]
    options.append("--config.delay=0.1")
    child = children.start(sys.executable, *options, **bucket.variables)
    saved = "killed/checkpoints/6/commit_success.txt"
    for _ in range(1200):
        if saved in bucket.names("killed/checkpoints/6/"):
            break
        time.sleep(0.05)
    child.kill()
    assert saved in bucket.names("killed/checkpoints/6/"), child.communicate()[0]
    child.communicate()
    printed = children.run(*options, **bucket.variables, GRPC_VERBOSITY="ERROR")
    assert "resuming after step" in printed
    states = [
        jax.tree.leaves(restore_params(place))
        for place in (tmp_path / "run", bucket.path("killed"))
    ]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [json.loads(x) for x in bucket.read("killed/metrics.jsonl").splitlines()]
    local = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(x["step"], x["loss"]) for x in local]
    assert "killed/log.txt" in bucket.names("killed/") and "killed/.lock" not in bucket.names()
    assert not [name for name in os.listdir() if name.startswith("gs:")]
