"""Meshes and placement rules; one child process with eight virtual devices does what needs them."""

import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import children
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import ConfigError

MESHES = {"fsdp": (2, 4, 1), "all": (2, 2, 2)}
STEPS = 4


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def box(shape: tuple[int, ...], *names: str | None) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, ["data=3", "8 devices"]),
        ({"data": -1, "fsdp": 3, "tensor": 1}, ["fsdp=3", "8 devices"]),
        ({"data": 2, "fsdp": 2, "tensor": 1}, ["8 devices", "-1 takes the rest"]),
        ({"data": -1, "fsdp": -1, "tensor": 1}, ["one may be -1"]),
        ({"data": 0}, ["at least 1"]),
        ({"data": 8, "model": 1}, ["'model'", "tensor"]),
    ],
)
def test_mesh_that_does_not_fit_is_refused(sizes, words):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(sizes, devices=[None] * 8)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("boxed", "mesh", "expected"),
    [
        (box((8, 16), "embed", "mlp"), (2, 4, 2), ("fsdp", "tensor")),
        (box((3, 8, 16), "layers", "embed", "heads"), (2, 4, 2), (None, "fsdp", "tensor")),
        (box((6, 16), "embed", "mlp"), (2, 4, 2), (None, "tensor")),  # 4 does not divide 6.
        (box((8, 8), "embed", "embed"), (2, 4, 2), ("fsdp", None)),  # An axis serves once.
        (box((8, 5), "embed", None), (1, 1, 1), ("fsdp", None)),
        (jax.ShapeDtypeStruct((8, 8), jnp.float32), (2, 4, 2), ()),  # No names: whole.
    ],
)
def test_rules(boxed, mesh, expected):
    placed = sharding.state_shardings({"w": boxed}, abstract_mesh(*mesh))["w"]
    assert placed.spec == PartitionSpec(*expected)


def test_what_an_optimizer_leaves_out_has_no_place():
    kernel, bias = box((8, 16), "embed", "mlp"), box((16,), "mlp")
    left_out = bias.replace(value=optax.MaskedNode())
    placed = sharding.state_shardings({"kernel": kernel, "bias": left_out}, abstract_mesh(2, 4, 2))
    assert placed["bias"] == optax.MaskedNode()
    assert placed["kernel"].spec == PartitionSpec("fsdp", "tensor")


def test_unknown_logical_name_is_refused_with_its_parameter():
    with pytest.raises(ValueError, match=r"\['w'\].*'embedd'.*RULES"):
        sharding.state_shardings({"w": box((8,), "embedd")}, abstract_mesh(1, 1, 1))


def test_batch_must_divide():
    sharding.check_batch_size(16, abstract_mesh(2, 4, 2))
    with pytest.raises(ConfigError, match="batch_size=12 is not a multiple of 8"):
        sharding.check_batch_size(12, abstract_mesh(2, 4, 2))


class Chip:
    """A device of a TPU, as far as a mesh asks; two slices of two hosts with two chips each."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, index: int):
        self.id, self.slice_index, self.process_index = index, index // 4, index // 2
        self.coords, self.core_on_chip = (index % 2, index // 2 % 2, 0), 0

    def __repr__(self):
        return f"chip {self.id}"


def test_only_the_data_axis_goes_from_slice_to_slice():
    chips = [Chip(i) for i in (5, 0, 7, 2, 4, 1, 6, 3)]
    for data, fsdp, tensor in ((2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "slices": 2}
        grid = sharding._across_slices((data, fsdp, tensor), 2, chips)
        assert grid.shape == (data, fsdp, tensor), sizes
        slices = np.vectorize(lambda chip: chip.slice_index)(grid)
        np.testing.assert_array_equal(slices[: data // 2], 0)
        np.testing.assert_array_equal(slices[data // 2 :], 1)


def test_slices_that_do_not_fit_are_refused():
    chips = [Chip(i) for i in range(8)]
    with pytest.raises(ConfigError, match=r"mesh\.slices=3 does not divide config\.mesh\.data=8"):
        sharding.make_mesh({"slices": 3}, chips)
    with pytest.raises(ConfigError, match=r"mesh\.slices=4: .*slices"):
        sharding.make_mesh({"slices": 4}, chips)
    with pytest.raises(ConfigError, match=r"mesh\.slices=2: "):  # One slice of two hosts.
        sharding.make_mesh({"slices": 2}, chips[:4])


def test_a_batch_that_processes_hold_only_in_part_is_refused(monkeypatch):
    def share(rows: list[int], processes: list[int]) -> tuple[int, int]:
        """Of process 0, where device i of process `processes[i]` holds the row `rows[i]`."""
        devices = [Chip(2 * process) for process in processes]
        held = {device: (slice(row, row + 1),) for device, row in zip(devices, rows, strict=True)}
        placement = types.SimpleNamespace(devices_indices_map=lambda shape: held)
        monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: placement)
        return sharding.batch_share(abstract_mesh(max(rows) + 1, 1, 1))

    assert share([0, 1, 2, 3], [0, 0, 1, 1]) == (0, 2)
    assert share([2, 3, 0, 1], [0, 0, 1, 1]) == (1, 2)
    assert share([0, 0, 1, 1], [0, 1, 2, 3]) == (0, 2)
    assert share([0, 0, 0, 0], [0, 0, 1, 1]) == (0, 1)
    with pytest.raises(ConfigError, match="cannot be cut along the 2 processes"):
        share([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1])


@pytest.fixture(scope="module")
def on_eight_devices() -> dict:
    return json.loads(children.run_on_eight_devices(__file__).splitlines()[-1])


@pytest.mark.slow
def test_training_on_a_mesh_equals_training_on_one_device(on_eight_devices):
    single = on_eight_devices["single"]
    assert len(set(single["losses"])) == STEPS
    for name in MESHES:
        found = on_eight_devices[name]
        np.testing.assert_allclose(found["losses"], single["losses"], rtol=1e-5)
        np.testing.assert_allclose(found["params"], single["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_state_is_created_and_stays_sharded(on_eight_devices):
    # The kernel is [16, 64] over ("embed", "mlp"); so are its Adam moments and its average.
    parts = {"single": [16, 64], "fsdp": [4, 64], "all": [8, 32]}
    for name, shape in parts.items():
        assert on_eight_devices[name]["created"] == [shape] * 4
        assert on_eight_devices[name]["trained"] == [shape] * 4


@pytest.mark.slow
def test_checkpoint_restores_onto_another_mesh(on_eight_devices):
    assert on_eight_devices["restored"] == {"same": True, "part": [8, 32]}


def _train_on(mesh: jax.sharding.Mesh, workdir: str | None = None) -> dict:
    import toy_task
    from detailflow_jax.runtime.checkpoint import Checkpoints

    config = toy_task.get_config()
    config.model.dropout = 0.0
    task = toy_task.make_task(config)
    rng = np.random.default_rng(0)
    with sharding.use(mesh):
        state = sharding.create_sharded(task.init, jax.random.key(0), mesh)
        created = _kernel_parts(state)
        step_fn = jax.jit(task.train_step, static_argnames="variant", donate_argnums=0)
        losses = []
        for step in range(STEPS):
            x = rng.normal(size=(16, toy_task.WIDTH)).astype(np.float32)
            batch = {"x": x, "label": np.arange(16, dtype=np.int32) % 8}
            batch = sharding.global_batch(batch, mesh)
            assert batch["x"].sharding.spec == PartitionSpec(("data", "fsdp"))
            state, metrics = step_fn(state, batch, task.plan(step)[1], variant=0)
            losses.append(float(metrics["loss"]))
        params = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]).tolist()
        if workdir:
            with Checkpoints(workdir, 1) as checkpoints:
                checkpoints.save(STEPS, state, {}, {})
    return {
        "losses": losses,
        "params": params,
        "created": created,
        "trained": _kernel_parts(state),
    }


def _kernel_parts(state) -> list[list[int]]:
    adam = state.opt_state[0]
    kernels = [tree["up"]["kernel"] for tree in (state.params, adam.mu, adam.nu, state.ema)]
    return [list(kernel.addressable_shards[0].data.shape) for kernel in kernels]


def _restore_on(mesh: jax.sharding.Mesh, workdir: str, params: list[float]) -> dict:
    import toy_task
    from detailflow_jax.runtime.checkpoint import Checkpoints

    task = toy_task.make_task(toy_task.get_config())
    with sharding.use(mesh), Checkpoints(workdir, 1) as checkpoints:
        abstract = sharding.abstract_state(task.init, jax.random.key(0), mesh)
        state = checkpoints.restore(abstract).state
    restored = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]).tolist()
    return {"same": restored == params, "part": _kernel_parts(state)[0]}


def main() -> None:
    import tempfile

    meshes = {
        name: sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
        for name, shape in MESHES.items()
    }
    meshes["single"] = sharding.make_mesh({"data": -1}, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as workdir:
        report = {
            name: _train_on(mesh, workdir if name == "fsdp" else None)
            for name, mesh in meshes.items()
        }
        report["restored"] = _restore_on(meshes["all"], workdir, report["fsdp"]["params"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
