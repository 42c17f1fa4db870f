"""Starts `jax.distributed`: many processes, one computation.

    distributed.start()    # before anything asks JAX for a device

Who this process is, of how many, and where process 0 listens, comes from the first that says so:

    flags         the arguments of `start`, see `add_arguments`
    environment   JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (launch/local.sh sets
                  them); an address without a port takes JAX_COORDINATOR_PORT or `PORT`
    TPU           the metadata server of a TPU VM, or the variables GKE gives a TPU pod;
                  slices count one after another
    Slurm         the variables of a step that srun started
    Kubernetes    JOB_COMPLETION_INDEX of an Indexed Job, with what launch/jobset.sh and XPK add

What is asked for by flags or environment fills in for the others, and must not contradict them.
"""

import argparse
import dataclasses
import glob
import importlib.util
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
from absl import logging

from detailflow_jax.runtime.errors import ConfigError

PORT = 8476  # Where process 0 listens, if nobody says otherwise.
TIMEOUT = 600  # Seconds: the hosts of a pod are not ready at the same moment.

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process's place: process `process_id` of `num_processes`, as `source` said.

    `local_devices` are the indices of the host's GPUs that are this process's; None: all devices.
    """

    source: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags whose values `start` takes; they are needed only where nothing else tells."""
    group = parser.add_argument_group("many processes", "found by itself on TPU, Slurm, Kubernetes")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes in all")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """Joins the other processes; does nothing for one process, and nothing when called again.

    Call it before the first use of a device, and end the program with `leave`. SIGTERM is JAX's
    from here on: it no longer ends the process, but makes
    `multihost_utils.reached_preemption_sync_point` say so in all of them.

    Returns:
        This process's place, or None where it is alone.

    Raises:
        ConfigError: see `find`; or process 0 has no address, or JAX is in use already.
    """
    cluster = find(
        os.environ,
        coordinator_address=coordinator_address,
        num_processes=num_processes,
        process_id=process_id,
    )
    if cluster is None or jax.distributed.is_initialized():
        return cluster
    # Without it the CPUs of several processes cannot reduce; elsewhere it changes nothing.
    os.environ.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    collectives = os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"]
    jax.config.update("jax_cpu_collectives_implementation", collectives)
    where = f"process {cluster.process_id} of {cluster.num_processes} ({cluster.source})"
    logging.info("%s joins at %s", where, cluster.coordinator_address)
    _await_name(cluster.coordinator_address.rsplit(":", 1)[0])
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_devices and list(cluster.local_devices),
            cluster_detection_method="deactivate",  # It was detected here.
            initialization_timeout=TIMEOUT,
        )
    except RuntimeError as error:
        if "before" in str(error):  # JAX's only word for it.
            raise ConfigError(f"distributed.start() comes too late for {where}: {error}") from error
        raise
    sys.excepthook = _fail
    return cluster


def leave(code: int) -> NoReturn:
    """Ends this process with `code`.

    At its exit a process of many waits for the others, which is right unless it failed: then they
    wait for it, in the middle of a step. So a failure ends the process at once.

    Args:
        code: 0 and 143 (preempted, in all processes) are no failures.
    """
    if code in (0, 143) or not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(*exception) -> NoReturn:
    sys.__excepthook__(*exception)
    leave(130 if issubclass(exception[0], KeyboardInterrupt) else 1)


def find(
    environ: Mapping[str, str],
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    metadata: Callable[[str], str | None] | None = None,
) -> Cluster | None:
    """This process's place in the cluster, starting nothing; None where it is alone.

    Args:
        environ: the variables to read.
        coordinator_address, num_processes, process_id: the flags; None where not given.
        metadata: attribute name -> text, None where there is none; default, the metadata server
            on a TPU VM.

    Raises:
        ConfigError: something is missing, is not a number, or contradicts something else.
    """
    environ = {name: value for name, value in environ.items() if value}
    flags = Cluster("flags", coordinator_address, num_processes, process_id)
    asked = _agree(flags, _from_environment(environ), Cluster.__dataclass_fields__)
    complete = None not in (asked.coordinator_address, asked.num_processes, asked.process_id)
    if metadata is None:
        # No question to the network where its answer would change nothing.
        alone = asked.num_processes == 1
        metadata = _metadata if _on_tpu_vm(environ) and not (complete or alone) else _no_metadata
    places = (source(environ, metadata) for source in (_from_tpu, _from_slurm, _from_kubernetes))
    found = next((place for place in places if place and place.num_processes != 1), None)
    if found:
        # Another address, say of a faster network, is a wish, not a contradiction.
        asked = _agree(asked, found, ("num_processes", "process_id"))
    return _checked(asked)


def _agree(first: Cluster, second: Cluster, compared) -> Cluster:
    """What `first` says, completed by `second`; ConfigError where they differ in `compared`."""
    merged = {}
    for name in ("coordinator_address", "num_processes", "process_id", "local_devices"):
        a, b = getattr(first, name), getattr(second, name)
        if name in compared and None not in (a, b) and a != b:
            raise ConfigError(
                f"{name} is {a} by the {first.source} but {b} by {second.source}: "
                "start all processes with one launcher, and leave out what it sets itself"
            )
        merged[name] = b if a is None else a
    says_nothing = (first.coordinator_address, first.num_processes, first.process_id) == (None,) * 3
    return Cluster(second.source if says_nothing else first.source, **merged)


def _checked(place: Cluster) -> Cluster | None:
    values = (place.coordinator_address, place.num_processes, place.process_id)
    if values == (None, None, None):
        return None
    if place.num_processes is not None and place.num_processes < 1:
        raise ConfigError(f"num_processes={place.num_processes}: expected at least 1")
    if place.num_processes == 1 and place.process_id in (None, 0):
        return None
    names = ("coordinator_address", "num_processes", "process_id")
    if missing := [name for name, value in zip(names, values, strict=True) if value is None]:
        raise ConfigError(
            f"the {place.source} does not tell {' and '.join(missing)}: give all of "
            + ", ".join(f"--{name} (or JAX_{name.upper()})" for name in names)
        )
    if not 0 <= place.process_id < place.num_processes:
        raise ConfigError(
            f"process_id={place.process_id}: expected 0 to {place.num_processes - 1}, "
            f"for num_processes={place.num_processes}"
        )
    if not re.fullmatch(r".+:\d+", place.coordinator_address):
        raise ConfigError(f"coordinator_address={place.coordinator_address}: expected HOST:PORT")
    return place


# ------------------------------------------------------------------------------------ the sources


def _from_environment(environ: Mapping[str, str]) -> Cluster:
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address and ":" not in address:
        address = f"{address}:{_number(environ, 'JAX_COORDINATOR_PORT', PORT)}"
    return Cluster(
        "environment",
        address,
        _number(environ, "JAX_NUM_PROCESSES"),
        _number(environ, "JAX_PROCESS_ID"),
    )


def _from_tpu(environ: Mapping[str, str], metadata: Callable) -> Cluster | None:
    """Hosts within a slice, then slices; several slices name their coordinator themselves."""
    # Where its library only compiles, without a TPU, it leaves texts in these variables.
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return None
    multislice = dict(environ)
    # GKE tells by variables (comma-separated names), a TPU VM by metadata: names, or, older,
    # NAME:ID:ADDRESS.
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names and "TPU_WORKER_ID" in environ:
        hosts = [name.split(":")[0] for name in names.split(",")]
        worker = _number(environ, "TPU_WORKER_ID")
    elif endpoints := metadata("worker-network-endpoints"):
        hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
        worker = int(metadata("agent-worker-number") or 0)
        lines = re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?", metadata("tpu-env") or "", re.M)
        multislice = dict(lines) | multislice
    else:
        return None
    multislice = {name: value for name, value in multislice.items() if value}
    coordinator = multislice.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    return Cluster(
        "TPU",
        f"{coordinator}:{PORT}",
        len(hosts) * _number(multislice, "MEGASCALE_NUM_SLICES", 1),
        worker + len(hosts) * _number(multislice, "MEGASCALE_SLICE_ID", 0),
    )


def _from_slurm(environ: Mapping[str, str], _metadata: Callable) -> Cluster | None:
    # The batch script itself has a SLURM_PROCID too; only a step of srun has a list of nodes.
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys():
        return None
    # "gpu[07-09,12],login" -> "gpu07"
    node = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environ["SLURM_STEP_NODELIST"]).group()
    node = re.sub(r"\[(\w+)[^\]]*\]", r"\1", node)
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return Cluster(
        "Slurm",
        # Jobs that share a node must not share a port.
        f"{node}:{61440 + _number(environ, 'SLURM_JOB_ID') % 4096}",
        _number(environ, tasks, 1),
        _number(environ, "SLURM_PROCID"),
        _slurm_devices(environ),
    )


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Several tasks on a node: a GPU each; unless Slurm shows each task only its own."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    several = any(int(count) > 1 for count in re.findall(r"(?:^|,)(\d+)", per_node))
    bound = len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return (_number(environ, "SLURM_LOCALID", 0),) if several and not bound else None


def _from_kubernetes(environ: Mapping[str, str], _metadata: Callable) -> Cluster | None:
    # An Indexed Job may as well be many runs of one process: only a count makes it one run. With an
    # id beside it, JAX_NUM_PROCESSES comes from somebody else, such as launch/local.sh in a pod.
    counts = ["JAX_PROCESS_COUNT", "NNODES"]
    counts += [] if "JAX_PROCESS_ID" in environ else ["JAX_NUM_PROCESSES"]
    count = next((_number(environ, name) for name in counts if name in environ), None)
    index = _number(environ, "JOB_COMPLETION_INDEX", _number(environ, "NODE_RANK"))
    if "KUBERNETES_SERVICE_HOST" not in environ or index is None or count is None:
        return None
    address = None
    if "JOBSET_NAME" in environ and "REPLICATED_JOB_NAME" in environ:
        jobset = environ["JOBSET_NAME"]
        address = f"{jobset}-{environ['REPLICATED_JOB_NAME']}-0-0.{jobset}:{PORT}"
    index += _number(environ, "JOB_INDEX", 0) * _number(environ, "PROCESSES_IN_JOB", 0)
    return Cluster("Kubernetes", address, count, index)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    if name not in environ:
        return default
    if not re.fullmatch(r"\d+", environ[name].strip()):
        raise ConfigError(f"{name}={environ[name]!r} in the environment: expected a number")
    return int(environ[name])


# -------------------------------------------------------------------------------------- the world


def _on_tpu_vm(environ: Mapping[str, str]) -> bool:
    wanted = environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    installed = importlib.util.find_spec("libtpu") is not None
    return "tpu" in wanted and "TPU_SKIP_MDS_QUERY" not in environ and installed and bool(chips)


def _no_metadata(_name: str) -> None:
    return None


def _metadata(name: str) -> str | None:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    for wait in (1, 2, 4, None):
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            reason = error
        except OSError as error:
            reason = error
        if wait:
            time.sleep(wait)
    raise ConfigError(
        f"this host has a TPU, but its metadata server does not tell {name}: {reason}; if the host "
        "is alone, set JAX_NUM_PROCESSES=1, else give --coordinator_address and the others"
    )


def _await_name(host: str) -> None:
    """Waits until `host` has an address; a pod's name has none before the pod is scheduled."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"process 0 should be at {host}, without an address after {TIMEOUT} s: {error}"
                ) from error
        time.sleep(2)
