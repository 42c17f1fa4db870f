"""Who this process is, as the environments of launchers and clusters tell; and a real start."""

import pathlib
import subprocess

import pytest

from detailflow_jax.runtime import distributed
from detailflow_jax.runtime.distributed import Cluster, find
from detailflow_jax.runtime.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]

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
    "SLURM_STEP_NUM_TASKS": "16",
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
GKE_TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a-0.gpt-l,a-1.gpt-l"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "gpt-l-slice-0-0.gpt-l:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
SECOND_SLICE = ("gpt-l-slice-0-0.gpt-l:8476", 4, 3, None)
POD = {  # Metadata of a TPU VM.
    "worker-network-endpoints": "unknown:8470:10.1.0.5,unknown:8470:10.1.0.6",
    "agent-worker-number": "1",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '1'\n",
}


def place(environ, metadata=None, **flags):
    """(address, processes, id, local devices), or None for a process alone."""
    cluster = find(environ, metadata=(metadata or {}).get, **flags)
    return cluster and (
        cluster.coordinator_address,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_devices,
    )


@pytest.mark.parametrize(
    ("environ", "metadata", "expected"),
    [
        (EXPLICIT, None, ("10.0.0.1:1234", 4, 3, None)),
        (SLURM, None, ("gpu07:61809", 16, 11, (3,))),  # 61440 + 70001 % 4096
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, None, ("gpu07:61809", 16, 11, None)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, None, ("gpu07:61809", 16, 11, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n[2-3]"}, None, ("n1:61809", 16, 11, (3,))),
        (JOBSET, None, ("gpt-l-slice-0-0.gpt-l:8476", 8, 6, None)),
        (GKE_TPU, None, ("a-0.gpt-l:8476", 2, 1, None)),
        (JOBSET | GKE_TPU | SLICES | {"JAX_NUM_PROCESSES": "4"}, None, SECOND_SLICE),
        ({}, POD, ("10.1.0.5:8476", 2, 1, None)),
        ({}, POD | {"worker-network-endpoints": "h0,h1,h2"}, ("h0:8476", 3, 1, None)),
        ({}, POD | {"tpu-env": "\n".join(f"{k}: '{v}'" for k, v in SLICES.items())}, SECOND_SLICE),
    ],
)
def test_environments(environ, metadata, expected):
    assert place(environ, metadata) == expected


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
    ("environ", "metadata"),
    [
        ({}, None),
        (dict.fromkeys(EXPLICIT, ""), None),
        ({"JAX_NUM_PROCESSES": "1"}, POD),
        ({}, {"worker-network-endpoints": "a:b:10.1.0.5", "agent-worker-number": "0"}),
        (GKE_TPU | {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        # A batch script, and a shell of salloc: not steps of many tasks.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # An Indexed Job of runs that have nothing to do with each other.
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "5"}, None),
    ],
)
def test_alone(environ, metadata):
    if environ.get("JAX_NUM_PROCESSES") == "1":
        metadata = None  # It is not asked for then; `find` leaves it out on a TPU VM.
    assert place(environ, metadata) is None
    # A launcher of its own within such a place is welcome.
    assert place(EXPLICIT | environ | EXPLICIT, None)[1:3] == (4, 3)


def test_flags_and_what_fills_in():
    flags = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0}
    assert place({}, **flags) == ("h:1", 2, 0, None)
    # Another address, of a faster network, with the rest from Slurm.
    assert place(SLURM, coordinator_address="ib0:99") == ("ib0:99", 16, 11, (3,))
    assert find(EXPLICIT) == Cluster("environment", "10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        (EXPLICIT, {"num_processes": 8}, ["num_processes", "8", "flags", "4", "environment"]),
        (EXPLICIT, {"coordinator_address": "h:1"}, ["coordinator_address", "h:1", "10.0.0.1:1234"]),
        (SLURM | EXPLICIT, {}, ["num_processes", "4", "environment", "16", "Slurm"]),
        (SLURM, {"process_id": 2}, ["process_id", "2", "flags", "11", "Slurm"]),
        (JOBSET | GKE_TPU, {}, ["num_processes", "8", "environment", "2", "TPU"]),
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


def test_one_process_starts_nothing(monkeypatch):
    for name in EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    started = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *a, **k: started.append(a)
    )
    assert distributed.start() is None and distributed.start(num_processes=1) is None
    assert started == []


TWO_PROCESSES = """
import jax
from detailflow_jax.runtime import distributed

place = distributed.start()
assert distributed.start() == place  # Again: nothing.
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

assert (jax.process_count(), jax.process_index()) == (2, place.process_id)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
mine = np.arange(2, dtype=np.float32) + 10 * place.process_id
x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), mine)
psum = jax.shard_map(
    lambda x: jax.lax.psum(x, "data"),
    mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
)
print("sum", float(jax.jit(psum)(x)[0]), jax.device_count())
if place.process_id == 1:
    raise OSError("a traceback")  # The other one waits for it at its exit.
distributed.leave(0)
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


def test_two_processes_reduce_over_loopback_and_one_fails():
    """0 + 1 + 10 + 11, over two processes of two devices; the failure is seen at once."""
    command = [ROOT / "launch" / "local.sh", "-n", "2", "--cpu-devices", "2", "--"]
    done = subprocess.run(
        [*command, "python", "-c", TWO_PROCESSES], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = {"[0] sum 22.0 4", "[1] sum 22.0 4", "[1] OSError: a traceback"}
    assert said <= set(done.stdout.splitlines())
    command = [ROOT / "launch" / "local.sh", "--cpu-devices", "1", "--"]
    subprocess.run([*command, "python", "-c", TOO_LATE], check=True, timeout=120)
