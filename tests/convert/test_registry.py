"""The registry of networks, and a network of another package that is added to it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from detailflow_jax.convert import CheckpointError, export, mapping, published
from detailflow_jax.convert.__main__ import main as convert
from detailflow_jax.convert.load import load
from detailflow_jax.convert.mapping import Entry, linear
from detailflow_jax.convert.registry import NETWORKS, Network, any_of, register
from detailflow_jax.runtime.weights import RECIPES, WEIGHTS
from detailflow_jax.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 4
    power: float = 1.0


class Toy(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, x):
        shift = self.param("shift", nn.initializers.zeros, (self.config.width,))
        return nn.Dense(self.config.width, name="first")(x) ** self.config.power + shift


def infer_config(s):
    s.by_shape("width", s.size("toy.fc.weight", 0))
    s.told("power", float, default=1.0)
    return s.build(ToyConfig)


TOY = Network(
    name="toy",
    title="toy of another package",
    recognise=any_of(["toy.fc.weight"]),
    module=Toy,
    example=lambda config: (jnp.zeros((1, 3)),),
    table=(*linear("toy.fc", "first"), Entry("toy.shift", ("shift",))),
    skipped=("toy.counter",),
    infer_config=infer_config,
    from_run=lambda model: ToyConfig(**model.to_dict()),
    describe=lambda config: ({"power": config.power}, {}, []),
)


@pytest.fixture
def toy():
    yield register(TOY)
    del NETWORKS["toy"]


def test_a_network_of_another_package(tmp_path, toy):
    """It is loaded, converted there and back, and loaded again, by its entry alone."""
    rng = np.random.default_rng(0)
    shapes = {"toy.fc.weight": (5, 3), "toy.fc.bias": (5,), "toy.shift": (5,)}
    state = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    tensors = {k: torch.from_numpy(x) for k, x in state.items()} | {"toy.counter": torch.ones(())}
    torch.save({"model": tensors, "args": {"power": 2.0}}, tmp_path / "toy.pt")

    assert published.name_of(state) == "toy"
    found = load("toy", tmp_path / "toy.pt")
    assert found.config == ToyConfig(5, 2.0) and found.report.skipped == ["toy.counter"]
    x = rng.standard_normal((2, 3)).astype(np.float32)
    want = (x @ state["toy.fc.weight"].T + state["toy.fc.bias"]) ** 2 + state["toy.shift"]
    got = Toy(found.config).apply({"params": found.params}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)

    ours, back = tmp_path / "ours", tmp_path / "back.pt"
    assert convert(["--to", "jax", "--src", str(tmp_path / "toy.pt"), "--dst", str(ours)]) == 0
    assert convert(["--to", "pytorch", "--src", str(ours), "--dst", str(back)]) == 0
    for path in (ours, back):
        again = load(None, path)
        assert (again.kind, again.config) == ("toy", found.config)
        jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    written = torch.load(back, weights_only=True)["model"]
    assert written.keys() == state.keys()
    frozen = published.read("toy", back, params=found.params)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, found.params)

    with pytest.raises(
        CheckpointError, match=r"looks like a toy of another.*expected a latent auto"
    ):
        load("vae", back)
    with pytest.raises(ValueError, match="network 'toy' already"):
        register(dataclasses.replace(TOY, title="another"))


def test_the_entries_agree_with_what_they_name():
    assert {n.task for n in NETWORKS.values() if n.task} == set(TASKS)
    assert all(n.task in (None, n.name) for n in NETWORKS.values())
    files = [file for n in NETWORKS.values() for file in n.files]
    assert sorted(files) == sorted(WEIGHTS)  # each file is of one network
    needed = {need.weights for needs in RECIPES.values() for need in needs}
    assert needed == set(files)


def test_what_is_read_only_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"LPIPS.* is read only"):
        export.export("lpips", None, {}, tmp_path / "x.pt")
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(3, 1)}, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=r"no conversion: config\.discriminator\.path"):
        load(None, tmp_path / "dino.pth")


def test_position_tables_are_resized_only_where_sizes_are_given():
    tensors = {"position_embedding.weight": np.ones((16, 2), np.float32)}
    table = (Entry("position_embedding.weight", ("table",)),)
    want = {"table": np.zeros((4, 2), np.float32)}
    fitted, _ = published._fitted(table, tensors, want)
    params, _ = mapping.from_published(table, fitted, want)
    np.testing.assert_allclose(params["table"], want["table"] + 1)
