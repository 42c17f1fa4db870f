"""What the TPU's compiler makes of a step on several chips: each computes its own rows only."""

import pathlib
import platform

import jax
import jax.numpy as jnp
import pytest

from detailflow_jax.models import layers
from detailflow_jax.ops import scales as grids
from detailflow_jax.pod import collectives, hlo, programs, topologies
from detailflow_jax.runtime import compiler, sharding
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH = 4 * 13  # No other size of the networks below is a multiple of it.
FLOWAR = [
    "--config.model.width=64", "--config.model.first_depth=1", "--config.model.second_depth=1",
    "--config.model.head_width=64", "--config.model.head_depth=1", "--config.model.head_dim=32",
    "--config.model.num_heads=2", "--config.model.scales=(1,2,4)", "--config.model.channels=4",
    "--config.model.num_classes=10",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the TPU compiler exists for Linux on x86-64 only",
)


def step_text(config_name: str, *overrides: str) -> str:
    """The text of a train step for four chips among which fsdp splits the parameters."""
    config = load_config(
        f"{ROOT}/configs/{config_name}", [*overrides, f"--config.batch_size={BATCH}"]
    )
    devices = topologies.devices(topologies.find("v5e-4"))
    program = programs.train_program(config, sharding.make_mesh({"fsdp": 4}, devices))
    return programs.compile_program(program).executable.as_text()


def of_the_whole_batch(text: str) -> set[str]:
    """Arrays with a row for every sample of the global batch, but for its labels and the like."""
    found = set()
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.instructions.values():
            for shape in instruction.shapes:
                whole = any(size % BATCH == 0 for size in shape.dims if size)
                if whole and shape.elements >= 16 * BATCH:
                    found.add(f"{shape.dtype}{list(shape.dims)} {instruction.attributes[-200:]}")
    return found


@pytest.mark.full
@pytest.mark.parametrize("injection", ["spatial", "spatial_cross"])
def test_no_chip_has_activations_of_the_whole_batch(injection):
    text = step_text("flowar.py:flowar_s", *FLOWAR, f"--config.model.injection={injection}")
    assert not of_the_whole_batch(text)


def scores(implementation: str, length: int = 341, heads: int = 2) -> set[str]:
    """Float32 arrays [.., length, length] in an attention layer's gradient on four chips."""
    layer = layers.Attention(
        heads, heads, use_bias=False, dtype=jnp.bfloat16, implementation=implementation
    )
    mesh = sharding.make_mesh({"fsdp": 4}, topologies.devices(topologies.find("v5e-4")))
    scale = grids.scale_index((1, 2, 4, 8, 16))
    mask = scale[:, None] >= scale[None]
    example, key = jnp.zeros((1, length, 64 * heads)), jax.random.key(0)
    with sharding.use(mesh):
        params = sharding.abstract_state(lambda key: layer.init(key, example), key, mesh)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.BATCH))
        x = jax.ShapeDtypeStruct((8, *example.shape[1:]), jnp.bfloat16, sharding=rows)

        def loss(params, x):
            return jnp.sum(jnp.square(layer.apply(params, x, mask=mask)[0].astype(jnp.float32)))

        step = jax.jit(jax.grad(loss)).trace(params, x).lower(lowering_platforms=("tpu",))
        module = hlo.parse(step.compile().as_text())
    computations = module.computations.values()
    every = [i for computation in computations for i in computation.instructions.values()]
    shapes = [shape for instruction in every for shape in instruction.shapes]
    return {
        str(shape)
        for shape in shapes
        if shape.dtype == "f32" and shape.elements >= 2 * heads * length**2
    }


def test_fused_attention_writes_no_scores():
    assert scores("plain") and not scores("auto")


def first_device(slice_name: str) -> jax.Device:
    return topologies.devices(topologies.find(slice_name))[0]


def test_options_of_the_compiler_are_of_the_kind_of_chip():
    every, v5e = compiler.OPTIONS["tpu"], compiler.OPTIONS["TPU v5 lite"]
    assert compiler.options(first_device("v5e-4")) == {**every, **v5e}
    assert compiler.options(first_device("v5p-8")) == every  # "TPU v5"
    assert compiler.options(jax.devices("cpu")[0]) == {}


def test_options_of_the_compiler_can_be_changed(monkeypatch):
    device = first_device("v5p-8")
    [name] = compiler.OPTIONS["tpu"]
    monkeypatch.setenv(compiler.VARIABLE, f"{name}=,xla_other=true")
    assert compiler.options(device) == {"xla_other": "true"}
    monkeypatch.setenv(compiler.VARIABLE, "xla_other")
    with pytest.raises(ConfigError, match="cannot read 'xla_other'"):
        compiler.options(device)


def test_an_option_changes_the_program(monkeypatch):
    """Over a whole v5e-256 gathers become all-reduces, unless an option of its table is set."""
    topology = topologies.find("v5e-256")
    mesh = sharding.make_mesh({"fsdp": 256}, topologies.devices(topology))

    def abstract(dtype, *shape_and_axes):
        shape, axes = zip(*shape_and_axes, strict=True)
        placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    kernels = abstract(jnp.float32, (2, None), (1024, "fsdp"), (1024, None))
    rows = abstract(jnp.bfloat16, (1024, sharding.BATCH), (1024, None))

    def step(kernels, rows, variant):
        product = lambda x, kernel: (jnp.tanh(x @ kernel.astype(x.dtype)), None)  # noqa: E731
        return kernels, jax.lax.scan(product, rows, kernels)[0]

    def gathers() -> int:
        with sharding.use(mesh):
            traced = sharding.jit_step(step, kernels).trace(kernels, rows, variant=None)
            text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        module = hlo.parse(text)
        found = collectives.find(module, hlo.executions(module), topology.chips)
        return sum(each.kind == "all-gather" for each in found)

    assert gathers()
    monkeypatch.setenv(compiler.VARIABLE, f"{next(iter(compiler.OPTIONS['TPU v5 lite']))}=")
    assert not gathers()


def test_an_unknown_option_is_not_passed_over(monkeypatch):
    """The compiler rejects it: so the table's options are known to it, and reach it."""
    devices = topologies.devices(topologies.find("v5e-4"))
    monkeypatch.setenv(compiler.VARIABLE, "xla_tpu_no_such_option=true")
    mesh = sharding.make_mesh({"fsdp": 4}, devices)
    placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placement)
    step = sharding.jit_step(lambda state, variant: (state + 1, ()), state)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        step.trace(state, variant=None).lower(lowering_platforms=("tpu",)).compile()
