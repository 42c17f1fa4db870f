"""Starts `jax.distributed`: several processes, one computation.

    distributed.start()    # before anything asks JAX for a device

JAX itself finds the other processes on a TPU pod (one or several slices, TPU VMs or GKE), in a step
of Slurm and under Open MPI. This module adds what JAX does not know:

    flags         the arguments of `start`, see `add_arguments`
    environment   JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (launch/local.sh sets
                  them); an address without a port takes JAX_COORDINATOR_PORT or `PORT`
    Kubernetes    an Indexed Job without TPUs, from variables alone: JAX would need the package
                  `kubernetes` and permission to ask the API server
    alone         whether there is one process only, where nothing is started
    GPUs          in Slurm with one task per node, or with each task bound to its own GPU, a process
                  takes all GPUs that it sees; JAX would take the one numbered by its local rank

Flags and environment take precedence over what JAX finds.
"""

import argparse
import dataclasses
import glob
import importlib.util
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from absl import logging

from detailflow_jax.runtime import compiler
from detailflow_jax.runtime.command import whole
from detailflow_jax.runtime.errors import ConfigError

COMPILER = "compiler"  # Name of the threads that compile.
PORT = 8476  # Where process 0 listens if nothing else says.
# Of Google's machines: JAX asks there for the other hosts of a pod, gcsfs for the account.
_METADATA = ("metadata.google.internal", "169.254.169.254")
TIMEOUT = 600  # Seconds: the hosts of a pod are not ready at the same moment.


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process is number `process_id` of `num_processes`; `source` names where that was found.

    JAX finds what is None. `local_devices` are the GPUs of the host that this process uses: () for
    all of them, None for JAX's own choice.
    """

    source: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags whose values `start` takes; needed only if nothing else says it."""
    group = parser.add_argument_group(
        "several processes",
        "not needed on TPU pods, in Slurm or in Kubernetes, where they are found by themselves",
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=whole(1), metavar="N", help="processes in all")
    group.add_argument("--process_id", type=whole(0), metavar="I", help="which one this is, from 0")


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """Joins the other processes; does nothing for one process or when called again.

    Call it before the first use of a device, and end the program with `leave`. From here on JAX
    handles SIGTERM: it no longer ends the process, but makes
    `multihost_utils.reached_preemption_sync_point` true in all of them.

    Returns:
        This process's place, or None where it is alone.

    Raises:
        ConfigError: see `find`; the other processes are not found, JAX is in use already, or the
            bucket for compiled programs cannot be used.
        BucketError: that bucket does not answer.
    """
    _reach_without_proxy("localhost", "127.0.0.1", *_METADATA)
    compiler.check_cache()
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
    # Processes talk by gRPC, which takes an empty value for no proxy: through one they would hang.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112
    place = (cluster.coordinator_address, cluster.num_processes, cluster.process_id)
    if complete := None not in place:
        address, count, index = place
        logging.info("process %d of %d (%s) joins at %s", index, count, cluster.source, address)
        _await_name(address.rsplit(":", 1)[0])
    devices = cluster.local_devices
    try:
        jax.distributed.initialize(
            *place,
            local_device_ids=None if devices is None else list(devices),
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=TIMEOUT,
        )
    except RuntimeError as error:
        if "before" not in str(error):  # JAX has no exception type for it.
            raise
        raise ConfigError(f"distributed.start() comes too late: {error}") from error
    except OSError as error:  # Of the network.
        raise ConfigError(
            f"JAX cannot find the other processes ({cluster.source}): {error}; if this host is "
            "alone, set JAX_NUM_PROCESSES=1, else give --coordinator_address, --num_processes and "
            "--process_id"
        ) from error
    except ValueError as error:
        if cluster != Cluster("TPU"):
            raise
        logging.info("a TPU, but no pod: this process is alone (%s)", error)
        return None
    sys.excepthook = _fail
    return cluster


def _reach_without_proxy(*hosts: str) -> None:
    """Exempts hosts from a proxy that the environment names for HTTP."""
    names = ("no_proxy", "NO_PROXY")
    known = [host.strip() for name in names for host in os.environ.get(name, "").split(",")]
    exempt = ",".join(dict.fromkeys(host for host in [*known, *hosts] if host))
    os.environ.update(dict.fromkeys(names, "*" if "*" in known else exempt))


def leave(code: int) -> NoReturn:
    """Ends this process with `code`.

    At its exit a process of many waits for the others. After a failure they would wait for it too,
    in the middle of a step. So a failure ends the process at once. So does the end of a run whose
    next program is being compiled: that can take minutes, and nobody needs it any more.

    Args:
        code: 0 and 143 (preempted, in all processes) are no failures.
    """
    together = jax.distributed.is_initialized()
    compiling = any(thread.name == COMPILER for thread in threading.enumerate())
    if not compiling and (code in (0, 143) or not together):
        sys.exit(code)
    if code in (0, 143) and together:
        jax.distributed.shutdown()  # Waits for the others.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(*exception) -> NoReturn:
    sys.__excepthook__(*exception)
    leave(130 if issubclass(exception[0], KeyboardInterrupt) else 1)


def find(environ: Mapping[str, str], **flags: str | int | None) -> Cluster | None:
    """Returns this process's place, starting nothing; None where it is alone.

    Args:
        environ: the variables to read.
        **flags: coordinator_address, num_processes, process_id; None where not given.

    Raises:
        ConfigError: something is missing, is not a number, or contradicts something else.
    """
    environ = {name: value for name, value in environ.items() if value}
    said, said_by = {}, {}
    for source, read in (
        ("flags", lambda _: flags),
        ("environment", _from_environment),
        ("Kubernetes", _from_kubernetes),
    ):
        if source == "Kubernetes" and len(said) == 3:
            continue
        for name, value in read(environ).items():
            # Another address, say of a faster network, is a wish, not a contradiction.
            wish = source == "Kubernetes" and name == "coordinator_address"
            if value is not None and said.get(name, value) != value and not wish:
                raise ConfigError(
                    f"{name} is {said[name]} by the {said_by[name]} but {value} by {source}: "
                    "start all processes with one launcher, and leave out what it sets itself"
                )
            if value is not None and name not in said:
                said[name], said_by[name] = value, source
    alone = said.get("num_processes") == 1 and said.get("process_id", 0) == 0
    if not alone and len(said) < 3 and (known := _known_to_jax(environ)):
        devices = _slurm_devices(environ) if known == "Slurm" else None
        return Cluster(known, **said, local_devices=devices)
    if alone or not said:
        return None
    source = next(iter(said_by.values()))
    _check(said, source)
    return Cluster(source, **said)


def _check(said: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError unless it is the whole place of one process among others."""
    names = ("coordinator_address", "num_processes", "process_id")
    address, count, index = map(said.get, names)
    if count is not None and count < 1:
        raise ConfigError(f"num_processes={count}: expected at least 1")
    if missing := [name for name in names if name not in said]:
        raise ConfigError(
            f"{' and '.join(missing)} missing, while others are given ({source}): give all of "
            + ", ".join(f"--{name} (or JAX_{name.upper()})" for name in names)
        )
    if not 0 <= index < count:
        raise ConfigError(
            f"process_id={index}: expected 0 to {count - 1}, for num_processes={count}"
        )
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"coordinator_address={address}: expected HOST:PORT")


def _known_to_jax(environ: Mapping[str, str]) -> str | None:
    """The cluster in which JAX finds the other processes by itself."""
    if _on_tpu_vm(environ):
        return "TPU"
    # The batch script itself has a SLURM_PROCID too; only a step of srun has a list of nodes.
    step = {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"}
    if step <= environ.keys() and _number(environ, "SLURM_NTASKS") > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environ and _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return "Open MPI"
    return None


# ------------------------------------------------------------------------------------ the sources


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address and ":" not in address:
        address = f"{address}:{_number(environ, 'JAX_COORDINATOR_PORT', PORT)}"
    return {
        "coordinator_address": address,
        "num_processes": _number(environ, "JAX_NUM_PROCESSES"),
        "process_id": _number(environ, "JAX_PROCESS_ID"),
    }


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """None, JAX's GPU by local rank, only where several tasks of a node see all its GPUs."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    several = any(int(count) > 1 for count in re.findall(r"(?:^|,)(\d+)", per_node))
    bound = len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return None if several and not bound else ()


def _from_kubernetes(environ: Mapping[str, str]) -> dict[str, Any]:
    # An Indexed Job may also be many runs of one process each: only a count makes it one run. With
    # an id beside it, JAX_NUM_PROCESSES comes from elsewhere, such as launch/local.sh in a pod. On
    # TPUs JAX reads GKE's own variables.
    counts = ["JAX_PROCESS_COUNT", "NNODES"]
    counts += [] if "JAX_PROCESS_ID" in environ else ["JAX_NUM_PROCESSES"]
    count = next((_number(environ, name) for name in counts if name in environ), None)
    index = _number(environ, "JOB_COMPLETION_INDEX", _number(environ, "NODE_RANK"))
    if "KUBERNETES_SERVICE_HOST" not in environ or index is None or count is None:
        return {}
    address = None
    if "JOBSET_NAME" in environ and "REPLICATED_JOB_NAME" in environ:
        jobset = environ["JOBSET_NAME"]
        address = f"{jobset}-{environ['REPLICATED_JOB_NAME']}-0-0.{jobset}:{PORT}"
    index += _number(environ, "JOB_INDEX", 0) * _number(environ, "PROCESSES_IN_JOB", 0)
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    if name not in environ:
        return default
    if not re.fullmatch(r"\d+", environ[name].strip()):
        raise ConfigError(f"{name}={environ[name]!r} in the environment: expected a number")
    return int(environ[name])


def _on_tpu_vm(environ: Mapping[str, str]) -> bool:
    wanted = environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and importlib.util.find_spec("libtpu") is not None and bool(chips)


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
