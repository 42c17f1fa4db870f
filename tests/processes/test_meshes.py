"""Every task on every mesh: the same step, the placements, what must not be whole on a device."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import children
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks import make_task

MESHES = {"data": (8, 1, 1), "both": (2, 4, 1), "all": (2, 2, 2), "fsdp": (1, 8, 1)}
PLACEMENTS = pathlib.Path(__file__).parents[1] / "fixtures" / "placements.json"
CONFIGS = {
    "tokenizer": "configs/tokenizer.py:detailflow_16",
    "generator": "configs/generator.py:detailflow_16",
    "flow_generator": "configs/generator.py:detailflow_16:head=flow",
    "vae": "configs/vae.py:kl16",
    "flowar": "configs/flowar.py:flowar_l",
}
WITHOUT_WEIGHTS = [
    "--config.teacher.random=True", "--config.losses.perceptual.random=True",
    "--config.discriminator.random=True",
]  # fmt: skip
SMALL = {
    "tokenizer": [
        "--config.model.encoder.width=32", "--config.model.encoder.depth=1",
        "--config.model.encoder.num_heads=4", "--config.model.encoder.mlp_dim=64",
        "--config.model.decoder.width=32", "--config.model.decoder.depth=1",
        "--config.model.decoder.num_heads=4", "--config.model.decoder.mlp_dim=64",
        "--config.full_probability=1.0",
    ],
    "adversarial": [
        "--config.losses.adversarial.weight=0.2", "--config.discriminator.start_step=0",
        "--config.discriminator.kind=dino", "--config.discriminator.random=True",
        "--config.discriminator.augment=True",
        "--config.discriminator.dino.width=16", "--config.discriminator.dino.depth=1",
        "--config.discriminator.dino.num_heads=2", "--config.discriminator.dino.patch_size=8",
        "--config.discriminator.dino.image_size=16",
        "--config.discriminator.dino.read_blocks=(0,)",
        "--config.discriminator.dino.kernel_size=3",
    ],
    "generator": [
        "--config.model.width=32", "--config.model.depth=1", "--config.model.multiple_of=8",
        "--config.model.token_dropout=0.0", "--config.model.residual_dropout=0.0",
    ],
    "flow_generator": [
        "--config.model.flow_width=32", "--config.model.flow_depth=1",
        "--config.model.flow_head_dim=8",
    ],
    "vae": ["--config.model.channels=8", "--config.model.multipliers=(1,2)"],
    "flowar": [
        "--config.model.width=32", "--config.model.first_depth=1", "--config.model.second_depth=1",
        "--config.model.head_width=32", "--config.model.head_depth=1",
        "--config.model.head_dim=8", "--config.model.attention_dropout=0.0",
        "--config.model.projection_dropout=0.0", "--config.model.scales=(1,2,4)",
        "--config.model.channels=4", "--config.model.num_classes=10",
    ],
}  # fmt: skip


OTHERS = ("data", "both", "fsdp")
TASKS = ("tokenizer", "generator", "flow_generator", "vae", "flowar")
# A mesh of all axes has those of the others. The generator's step compiles fastest.
CASES = [("generator", ("all",))]
WHOLE = dict.fromkeys(TASKS, ("all", *OTHERS)) | {"adversarial": ("all",)}
CASES += [pytest.param(*case, marks=pytest.mark.full) for case in WHOLE.items()]


@pytest.mark.parametrize(("name", "meshes"), CASES)
def test_a_step_on_every_mesh_is_that_of_one_device(name, meshes):
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # Partitioning is done all the same.
    printed = children.run_on_eight_devices(__file__, name, *meshes, timeout=800, **fast)
    found = json.loads(printed.splitlines()[-1])
    single = found.pop("single")
    assert found.keys() == set(meshes)
    for mesh, difference in found.items():
        assert difference["loss"] <= 1e-5 * abs(single["loss"]), mesh
        assert difference["update"] <= 1e-5, mesh  # of the largest parameter


def abstract_mesh(shape):
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def abstract_state(name):
    overrides = WITHOUT_WEIGHTS if name == "tokenizer" else []
    task = make_task(load_config(CONFIGS[name], overrides))
    return jax.eval_shape(task.init, jax.random.key(0))


def placed(name, shape):
    """[(path, shape, bytes, spec)] of a published configuration's state on a mesh."""
    boxed = abstract_state(name)
    shardings = sharding.state_shardings(boxed, abstract_mesh(shape))
    leaves = jax.tree_util.tree_leaves_with_path(sharding.unboxed(boxed))
    specs = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
    for (path, leaf), place in zip(leaves, specs, strict=True):
        size = leaf.size * jnp.dtype(leaf.dtype).itemsize
        yield jax.tree_util.keystr(path), leaf.shape, size, place.spec


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_large_is_whole_on_every_device_under_fsdp(name):
    whole = [
        f"{path} {shape}"
        for path, shape, size, spec in placed(name, (1, 8, 1))
        if size > 2**20 and not any(axis for axis in spec)
    ]
    assert not whole, whole


def test_the_discriminator_is_of_the_published_size():
    heads = sharding.unboxed(abstract_state("tokenizer")).extra["discriminator"]["params"]
    assert sum(x.size for x in jax.tree.leaves(heads)) == 7_386_245


@pytest.mark.parametrize("name", CONFIGS)
def test_placements_are_the_recorded_ones(name):
    """`python tests/processes/test_meshes.py placements` records them after an intended change."""
    assert json.loads(PLACEMENTS.read_text())[name] == placements(name)


def placements(name):
    """Path -> axes of every trained parameter on a mesh of 2 x 4 x 2."""
    return {
        path.removeprefix(".params"): " ".join(str(axis or "-") for axis in spec)
        for path, _, _, spec in placed(name, (2, 4, 2))
        if path.startswith(".params")
    }


# ------------------------------------------------------------------------------ the child process


def small_batch(name, config):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, 8).astype(np.int32)
    if name in ("tokenizer", "adversarial", "vae"):
        side = config.data.image_size
        return {"image": rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8), "label": label}
    if name in ("generator", "flow_generator"):
        codes = rng.integers(0, 256, (8, config.model.num_tokens, 3)).astype(np.int32)
        return {"codes": codes, "label": label}
    return {"moments": rng.standard_normal((8, 4, 4, 8)).astype(np.float32), "label": label}


def step_on(task, mesh, state, batch):
    """(parameters after one step on a mesh, the discriminator's too, and its loss)."""
    shardings = sharding.state_shardings(jax.eval_shape(task.init, jax.random.key(0)), mesh)
    with sharding.use(mesh):
        state = jax.device_put(state, shardings)
        variant, plan = task.plan(0)
        step = jax.jit(task.train_step, static_argnames="variant", out_shardings=(shardings, None))
        split = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
        state, metrics = step(state, jax.device_put(batch, split), plan, variant=variant)
    trained = state.params, state.extra.get("discriminator")
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(trained))
    # A bias under a batch norm has no gradient but rounding, of which Adam makes a whole step.
    kept = [leaf for path, leaf in leaves if "_conv']['bias']" not in jax.tree_util.keystr(path)]
    return kept, float(metrics["loss"])


def compare_meshes(name, meshes):
    """The step of one device, and how far from it the step of every mesh ends."""
    sizes = {"single": (1, 1, 1)} | {mesh: MESHES[mesh] for mesh in meshes}
    if name == "adversarial":  # the tokenizer's step with the discriminator's
        config = load_config("configs/tokenizer.py:digits", SMALL["tokenizer"] + SMALL[name])
    elif name == "flow_generator":
        overrides = SMALL["generator"] + SMALL[name]
        config = load_config("configs/generator.py:digits:head=flow", overrides)
    else:
        config = load_config(f"configs/{name}.py:digits", SMALL[name])
    task, batch = make_task(config), small_batch(name, config)
    # Compiled once: how a state is made on a mesh, test_sharding.py tells.
    alone = sharding.make_mesh({}, jax.devices()[:1])
    state = jax.device_get(sharding.create_sharded(task.init, jax.random.key(0), alone))
    results = {}
    for mesh_name, shape in sizes.items():
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)), devices)
        results[mesh_name] = step_on(task, mesh, state, batch)
    want, want_loss = results.pop("single")
    largest = max(np.abs(x).max() for x in want)
    out = {"single": {"loss": want_loss}}
    for mesh_name, (params, loss) in results.items():
        pairs = zip(params, want, strict=True)
        update = max(float(np.abs(a - b).max()) for a, b in pairs) / float(largest)
        out[mesh_name] = {"loss": abs(loss - want_loss), "update": update}
    return out


if __name__ == "__main__":
    if sys.argv[1:] == ["placements"]:
        PLACEMENTS.write_text(json.dumps({n: placements(n) for n in CONFIGS}, indent=1) + "\n")
    else:
        name, *meshes = sys.argv[1:]
        print(json.dumps(compare_meshes(name, meshes)))
