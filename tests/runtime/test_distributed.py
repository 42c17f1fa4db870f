"""Who this process is, from launchers and environments; what is left to JAX; and real starts."""

import os
import pathlib
import socket
import subprocess
import sys
import urllib.request

import pytest

from detailflow_jax.runtime import distributed
from detailflow_jax.runtime.distributed import Cluster, find
from detailflow_jax.runtime.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]

MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
JOBSET = {  # What launch/jobset.yaml sets, on nodes without TPUs.
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "JOB_COMPLETION_INDEX": "2",
    "JOB_INDEX": "1",
    "PROCESSES_IN_JOB": "4",
    "JAX_NUM_PROCESSES": "8",
    "JOBSET_NAME": "gpt-l",
    "REPLICATED_JOB_NAME": "slice",
}


@pytest.mark.parametrize("exempt", ["", "intranet.example", "*"])
def test_the_machines_own_addresses_need_no_proxy(monkeypatch, exempt):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NO_PROXY", exempt)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # Nobody listens there.
    distributed.start()
    for host in ("127.0.0.1:8476", "metadata.google.internal", *filter(None, [exempt])):
        assert urllib.request.proxy_bypass_environment(host), host
    assert exempt == "*" or not urllib.request.proxy_bypass_environment("storage.googleapis.com")


def place(environ, **flags):
    """(address, processes, id, local devices), or None for a process alone."""
    cluster = find(environ, **flags)
    return cluster and (
        cluster.coordinator_address,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_devices,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (EXPLICIT, ("10.0.0.1:1234", 4, 3, None)),
        (SLURM, (None, None, None, None)),  # All is left to JAX, a GPU per process too.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, (None, None, None, ())),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, (None, None, None, ())),
        (JOBSET, ("gpt-l-slice-0-0.gpt-l:8476", 8, 6, None)),
        (MPI, (None, None, None, None)),
    ],
)
def test_environments(environ, expected):
    assert place(environ) == expected


def test_xpk_on_gpus():
    """It gives the address without a port, the ranks under names of its own."""
    environ = {
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "JAX_COORDINATOR_ADDRESS": "gpt-l-slice-job-0-0.gpt-l",
        "JAX_COORDINATOR_PORT": "6002",
        "NNODES": "2",
        "NODE_RANK": "1",
    }
    assert place(environ) == ("gpt-l-slice-job-0-0.gpt-l:6002", 2, 1, None)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        dict.fromkeys(EXPLICIT, ""),
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
        # A batch script, and a shell of salloc: not steps of many tasks.
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        # An Indexed Job of runs that have nothing to do with each other.
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "5"},
    ],
)
def test_alone(environ):
    assert place(environ) is None
    # A launcher of its own within such a place is welcome.
    assert place(EXPLICIT | environ | EXPLICIT)[1:3] == (4, 3)


def test_flags_and_what_fills_in():
    flags = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0}
    assert place({}, **flags) == ("h:1", 2, 0, None)
    # Another address, of a faster network, with the rest from JAX.
    assert place(SLURM, coordinator_address="ib0:99") == ("ib0:99", None, None, None)
    assert find(EXPLICIT) == Cluster("environment", "10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        (EXPLICIT, {"num_processes": 8}, ["num_processes", "8", "flags", "4", "environment"]),
        (EXPLICIT, {"coordinator_address": "h:1"}, ["coordinator_address", "h:1", "10.0.0.1:1234"]),
        (JOBSET, {"process_id": 2}, ["process_id", "2", "flags", "6", "Kubernetes"]),
        ({"JAX_NUM_PROCESSES": "2"}, {}, ["coordinator_address and process_id", "--process_id"]),
        ({}, {"process_id": 1, "num_processes": 1}, ["coordinator_address"]),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, {}, ["process_id=4", "0 to 3"]),
        (EXPLICIT | {"JAX_PROCESS_ID": "two"}, {}, ["JAX_PROCESS_ID='two'", "number"]),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "0"}, {}, ["num_processes=0", "at least 1"]),
        ({}, {"coordinator_address": "h", "num_processes": 2, "process_id": 0}, ["HOST:PORT"]),
    ],
)
def test_contradictions_and_gaps(environ, flags, words):
    with pytest.raises(ConfigError) as error:
        place(environ, **flags)
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture
def started(monkeypatch):
    """What `jax.distributed.initialize` is called with, in place of a start."""
    for name in [*EXPLICIT, *SLURM]:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *a, **k: calls.append((*a, k))
    )
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return calls


def test_one_process_starts_nothing(started):
    assert distributed.start() is None and distributed.start(num_processes=1) is None
    assert started == []


def test_jax_is_told_what_was_asked_for_and_finds_the_rest(started, monkeypatch):
    assert distributed.start("127.0.0.1:1", 2, 0).process_id == 0
    *place, options = started.pop()
    assert place == ["127.0.0.1:1", 2, 0]
    assert options["cluster_detection_method"] == "deactivate"
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.start("ib0:99")
    *place, options = started.pop()
    assert place == ["ib0:99", None, None]
    assert options["cluster_detection_method"] is None and options["local_device_ids"] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    distributed.start("ib0:99")
    assert started.pop()[-1]["local_device_ids"] == []


def test_a_tpu_vm_is_left_to_jax_and_may_be_no_pod(started, monkeypatch):
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda environ: True)
    assert distributed.start() == Cluster("TPU")
    assert started.pop()[:3] == (None, None, None)

    def fail(error):
        def initialize(*args, **options):
            raise error

        monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)

    fail(ValueError("coordinator_address should be defined."))
    assert distributed.start() is None
    fail(ConnectionError("no metadata server"))
    with pytest.raises(ConfigError, match=r"no metadata server.*JAX_NUM_PROCESSES=1"):
        distributed.start()


TWO_PROCESSES = """
import jax
from detailflow_jax.runtime import distributed

place = distributed.start()
assert distributed.start() == place  # Again: nothing.
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

assert (jax.process_count(), jax.process_index()) == (2, place.process_id)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
mine = np.arange(2, dtype=np.float32) + 10 * place.process_id
x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), mine)
psum = jax.shard_map(
    lambda x: jax.lax.psum(x, "data"),
    mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
)
print("sum", float(jax.jit(psum)(x)[0]), jax.device_count(), flush=True)
multihost_utils.sync_global_devices("said")  # The launcher ends the other one at once.
if place.process_id == 1:
    raise OSError("a traceback")  # The other one waits for it at its exit.
distributed.leave(0)
"""

ONE_IS_GONE = """
import os, signal, time
from detailflow_jax.runtime import distributed, errors, sharding

place = distributed.start()
sharding.sync_processes("both are here")
if place.process_id == 0:
    time.sleep(0.5)  # The other one waits already.
    os._exit(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The launcher's, which may come before the news.
try:
    sharding.sync_processes("never")
except errors.UserError as error:
    distributed.leave(error.report())
"""

TOO_LATE = """
import jax, sys
from detailflow_jax.runtime import distributed
jax.devices()
try:
    distributed.start("127.0.0.1:1", 2, 0)
except distributed.ConfigError as error:
    sys.exit(0 if "too late" in str(error) else 1)
"""


@pytest.mark.slow
def test_two_processes_reduce_over_loopback_and_one_fails(monkeypatch):
    """0 + 1 + 10 + 11, over two processes of two devices; the failure is seen at once."""
    monkeypatch.setenv("DETAILFLOW_KILL_SECONDS", "1")
    command = [ROOT / "launch" / "local.sh", "-n", "2", "--cpu-devices", "2", "--"]
    done = subprocess.run(
        [*command, "python", "-c", TWO_PROCESSES], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = {"[0] sum 22.0 4", "[1] sum 22.0 4", "[1] OSError: a traceback"}
    assert said <= set(done.stdout.splitlines())
    command = [ROOT / "launch" / "local.sh", "--cpu-devices", "1", "--"]
    subprocess.run([*command, "python", "-c", TOO_LATE], check=True, timeout=120)


@pytest.mark.slow
def test_who_waits_for_a_process_that_is_gone_says_so_without_a_traceback():
    command = [ROOT / "launch" / "local.sh", "-n", "2", "--cpu-devices", "1", "--"]
    done = subprocess.run(
        [*command, "python", "-c", ONE_IS_GONE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    # JAX may hear of it first, and ends the process by itself.
    reasons = ("failed: another process of this run is gone", "another task died")
    told = [line for line in done.stdout.splitlines() if line.startswith("[1] ")]
    assert any(reason in line for line in told for reason in reasons), done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_jax_finds_the_processes_of_a_slurm_step():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for i in range(2):
        environ = SLURM | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2"}
        environ |= {"SLURM_STEP_NODELIST": "localhost,n[2-3]", "JAX_COORDINATOR_PORT": port}
        script = "import jax; from detailflow_jax.runtime import distributed; distributed.start(); "
        script += "print(jax.process_index(), jax.process_count()); distributed.leave(0)"
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                env={**os.environ, **environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    told = [child.communicate(timeout=120)[0] for child in children]
    assert told == ["0 2\n", "1 2\n"]
