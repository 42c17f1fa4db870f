"""Placement by rule: models name the axes of their arrays, the mesh is configuration.

The mesh has three axes. `data` holds copies of the model; `fsdp` splits the batch too, and every
large parameter by its width (gathered again where it is used); `tensor` splits the heads, the
hidden width of the MLPs and the vocabulary. No model or task knows about devices: `RULES` is
the only place where a logical name meets a mesh axis.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from detailflow_jax.runtime import compiler
from detailflow_jax.runtime.errors import ConfigError, ProcessLost, raised_as

PyTree = Any

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Logical name -> mesh axis, None where a dimension is never split.
RULES = (
    # of parameters
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("positions", None),
    ("pixels", None),
    ("code", None),
    ("norm", None),
    # of activations, which also use "heads", "mlp" and "vocab"
    ("batch", BATCH),
    ("length", None),
    ("embed_act", None),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh of a run.

    Args:
        sizes: {"data": -1, "fsdp": 1, "tensor": 1}, which are the defaults; one axis may be -1, it
            takes the rest. Beside them "slices", how many pods with a slow network between them
            the data axis spans.
        devices: default all devices of all processes.

    Raises:
        ConfigError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(sizes)
    slices = sizes.pop("slices", 1)
    shape = [sizes.get("data", -1), sizes.get("fsdp", 1), sizes.get("tensor", 1)]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if unknown := set(sizes) - set(AXES):
        raise ConfigError(f"config.mesh has unknown axes {sorted(unknown)}: expected {AXES}")
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise ConfigError(f"config.mesh is {asked}: sizes are at least 1, and one may be -1")
    known = int(np.prod([size for size in shape if size > 0]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    elif known != len(devices) or -1 in shape:
        raise ConfigError(
            f"config.mesh is {asked}: that does not divide {len(devices)} devices; "
            "the product of the sizes must be the number of devices (-1 takes the rest)"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    if slices == 1:  # `jax.make_mesh` does not split a physical axis of a pod.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = _across_slices(shape, slices, devices)
    return Mesh(grid, AXES, axis_types=kinds)


def _across_slices(shape: Sequence[int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array of `shape` in which only the data axis goes from slice to slice."""
    data, *inner = shape
    if slices < 1 or data % slices:
        raise ConfigError(
            f"config.mesh.slices={slices} does not divide config.mesh.data={data}: "
            "the data axis spans the slices"
        )
    # Devices without a slice index: each process counts as a slice.
    untold = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    with raised_as(ConfigError, f"config.mesh.slices={slices}: "):
        return mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inner),
            (slices, *[1] * len(inner)),
            devices,
            process_is_granule=untold and devices[0].platform != "tpu",
            allow_split_physical_axes=True,
        )


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Within it, `nn.with_logical_constraint` in models means this mesh and `RULES`."""
    platform = mesh.devices.flat[0].platform
    with compiler.target(platform), jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


# --------------------------------------------------------------------------------------- the state


def abstract_state(init: Callable[[jax.Array], PyTree], key: jax.Array, mesh: Mesh) -> PyTree:
    """What `create_sharded` returns, as `jax.ShapeDtypeStruct` with shardings; allocates nothing.

    Args:
        init: key -> state whose parameters are in flax boxes (`nn.with_logical_partitioning`).
            Optimizer state and averages made from them carry the same boxes.

    Raises:
        ValueError: an array has a logical name that `RULES` lacks.
    """
    boxed = jax.eval_shape(init, key)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unboxed(boxed),
        state_shardings(boxed, mesh),
    )


def state_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """`NamedSharding` for each array of an abstract boxed state, by `RULES`.

    A dimension that its mesh axis does not divide stays whole, and so does the second of two
    dimensions that ask for the same axis.
    """

    def place(path, names: PartitionSpec, leaf) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # An optimizer keeps nothing for this array.
            return leaf
        spec = _partition(names, leaf.shape, mesh, jax.tree_util.keystr(path))
        return NamedSharding(mesh, spec)

    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    names = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(place, names, unboxed(boxed), is_leaf=is_spec)


def unboxed(state: PyTree) -> PyTree:
    """Returns the arrays of a state, concrete or abstract, without their flax boxes."""
    # Not `nn.unbox`: that constrains the sharding, which abstract arrays cannot have done to them.
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, state, is_leaf=is_box)


def _partition(names: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, where: str):
    rules = dict(RULES)
    axes = []
    for name, size in zip(names, shape, strict=False):
        if name is not None and name not in rules:
            raise ValueError(f"{where}: unknown logical axis {name!r}; add it to sharding.RULES")
        axis = rules.get(name)
        # fsdp and tensor axes of size 1 are named too: the placement then reads the same.
        free = axis is not None and axis not in axes and size % mesh.shape[axis] == 0
        axes.append(axis if free else None)
    return PartitionSpec(*axes)


def create_sharded(init: Callable[[jax.Array], PyTree], key: jax.Array, mesh: Mesh) -> PyTree:
    """Runs `init` so that each device makes only its part; returns the state without its boxes."""
    shardings = state_shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(lambda key: unboxed(init(key)), out_shardings=shardings)(key)


def on_every_device(params: PyTree, mesh: Mesh) -> PyTree:
    """Arrays of this host, the same in every process, whole on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> jax.Array:
        array = np.asarray(x)
        return jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)

    return jax.tree.map(place, params)


def left_whole(state: PyTree, above: int = 2**20) -> dict[str, int]:
    """{name: bytes} of arrays above `above` bytes that fsdp leaves whole on every device.

    Args:
        state: arrays, or `abstract_state`, with `NamedSharding`s.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        placement, size = leaf.sharding, bytes_a_device(leaf)
        split = any("fsdp" in _axes(entry) for entry in placement.spec)
        if placement.mesh.shape["fsdp"] > 1 and size > above and not split:
            shape = ",".join(map(str, leaf.shape))
            found[f"{jax.tree_util.keystr(path, simple=True, separator='/')} [{shape}]"] = size
    return found


def bytes_a_device(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on each device that holds a part of it."""
    item = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * item


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def jit_step(train_step: Callable, state: PyTree) -> Callable:
    """The compiled form of a task's train step, for a state that is placed as `state` is.

    Args:
        train_step: (state, batch, plan, variant=) -> (state, metrics).
        state: placed arrays, or `abstract_state`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    [device, *_] = jax.tree.leaves(shardings)[0].mesh.devices.flat
    return jax.jit(
        train_step,
        static_argnames="variant",  # One compilation per variant.
        donate_argnums=0,  # The new state takes the memory of the old one.
        out_shardings=(shardings, None),
        compiler_options=compiler.options(device),
    )


# --------------------------------------------------------------------------------------- the batch


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError where the data and fsdp axes do not divide the global batch."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    if batch_size % parts:
        raise ConfigError(
            f"config.batch_size={batch_size} is not a multiple of {parts}, over which "
            f"the mesh splits it (data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']})"
        )


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process reads the i-th of n equal blocks of every batch.

    Processes whose devices hold the same rows, for a tensor axis goes from one to the other, read
    the same block.

    Raises:
        ConfigError: the devices of two processes share only some of their rows.
    """
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    rows = NamedSharding(mesh, PartitionSpec(BATCH)).devices_indices_map((parts,))
    held: dict[int, set[int]] = {}
    for device, (part,) in rows.items():
        held.setdefault(device.process_index, set()).add(part.start or 0)
    blocks = sorted({tuple(sorted(block)) for block in held.values()})
    if len(set(map(len, blocks))) > 1 or sum(map(len, blocks)) != parts:
        raise ConfigError(
            f"config.mesh is {dict(mesh.shape)}: its batch cannot be cut along the "
            f"{len(held)} processes; let tensor divide the devices of a process, or be a multiple"
        )
    return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)


_barriers = itertools.count()
_WAIT = 24 * 3600  # Seconds; a process that is lost ends the waiting long before.


def sync_processes(name: str) -> None:
    """Waits until all processes of the run are here; nothing where there is one.

    It asks the coordinator, not the devices: their collectives give up after seconds.

    Raises:
        ProcessLost: another one is gone, so it will not come.
    """
    if jax.process_count() == 1:
        return
    barrier = ocp.multihost.get_barrier_sync_fn()
    try:
        barrier(key=f"detailflow_{name}_{next(_barriers)}", timeout_ms=1000 * _WAIT)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ProcessLost(
            f"another process of this run is gone, and this one waited for it ({reason}); "
            "the log of that process says why"
        ) from error


def gather_processes(x: np.ndarray) -> np.ndarray:
    """The rows of all processes, [b, ...] -> [b * process_count, ...], in every one of them.

    All must call together, but may come when they are ready.
    """
    sync_processes("gather")
    return multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x


def in_all_processes(fact: bool) -> bool:
    """Whether `fact` holds in every process; all must ask together."""
    return bool(gather_processes(np.array([fact])).all())


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array in every process, which must all ask for it together."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def global_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Places a batch on the devices, split over data and fsdp; does not wait for the copy.

    Args:
        batch: numpy arrays with this process's rows of the global batch, [b, ...].

    Returns:
        jax.Array with the rows of all processes, [b * process_count, ...].
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
