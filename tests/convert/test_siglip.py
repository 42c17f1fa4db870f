"""SigLIP2 against Hugging Face's own model, from files that it wrote itself."""

import einops
import jax
import numpy as np
import pytest
import torch

import golden_files
from detailflow_jax.convert import CheckpointError, published
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.models import siglip
from detailflow_jax.models.tokenizer import TokenizerConfig
from siglip_files import SIZE, vision_settings

TOLERANCE = 2e-6


def params_like(size):
    model = siglip.VisionTransformer(size)
    example = np.zeros((1, size.patch_size, size.patch_size, 3), np.float32)
    init = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    return jax.tree.map(lambda x: x.value, init, is_leaf=lambda x: hasattr(x, "names"))


def read(path, params):
    return published.read("siglip2", path, params=params).params


def their_features(model, images, size):
    """Last hidden state and the states after every layer, of images [B, H, W, 3] in [-1, 1]."""
    # Their image processor's order: rows of patches; in a patch row, column, channel.
    patches = einops.rearrange(
        torch.from_numpy(images), "b (h p) (w q) c -> b (h w) (p q c)", p=size.patch_size,
        q=size.patch_size,
    )  # fmt: skip
    grid = [n // size.patch_size for n in images.shape[1:3]]
    with torch.no_grad():
        out = model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
            spatial_shapes=torch.tensor([grid] * len(images)),
            output_hidden_states=True,
        )
    return out.last_hidden_state.numpy(), [x.numpy() for x in out.hidden_states]


@pytest.mark.parametrize("file", ["vision", "both", "training.pt"])
@pytest.mark.parametrize("grid", [(6, 6), (4, 4), (9, 9), (3, 7), (8, 5)])
def test_same_features(theirs, file, grid):
    model, files = theirs
    images = np.random.default_rng(0).uniform(-1, 1, (2, grid[0] * 4, grid[1] * 4, 3))
    images = images.astype(np.float32)
    want, _ = their_features(model, images, SIZE)
    params = read(str(files[file]), params_like(SIZE))
    got = jax.jit(siglip.VisionTransformer(SIZE).apply)({"params": params}, images)
    assert golden_files.error(got, want) <= TOLERANCE


def test_first_layers_and_another_grid(theirs):
    """The encoder takes fewer layers, and a table of another side resized as for such a grid."""
    model, files = theirs
    size = siglip.ViTConfig(48, 2, 4, 80, patch_size=4, table_side=9)
    params = read(str(files["both"]), params_like(size))
    images = np.random.default_rng(1).uniform(-1, 1, (1, 36, 36, 3)).astype(np.float32)
    _, states = their_features(model, images, SIZE)
    network = siglip.VisionTransformer(size)
    got, _ = network.apply({"params": params}, images, method="encode_patches")
    assert golden_files.error(got, states[2]) <= TOLERANCE
    assert params["position_table"].shape == (81, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, r"has shape \(48, 48\); expected \(64, 48\)"),
        ({"depth": 4}, r"tensors are missing.*encoder\.layers\.3\."),
        ({"mlp_dim": 96}, r"mlp\.fc1\.weight' has shape \(80, 48\); expected \(96, 48\)"),
        ({"patch_size": 8}, r"patch_embedding\.weight' has shape \(48, 48\)"),
    ],
)
def test_other_sizes_are_refused(theirs, change, message):
    size = {"width": 48, "depth": 3, "num_heads": 4, "mlp_dim": 80, "patch_size": 4} | change
    with pytest.raises(CheckpointError, match=message):
        read(str(theirs[1]["vision"]), params_like(siglip.ViTConfig(**size)))


def test_another_network_is_refused(tmp_path):
    torch.save({"tok_embeddings.weight": torch.ones(4, 2)}, tmp_path / "gpt.pt")
    with pytest.raises(CheckpointError, match=r"looks like a DetailFlow generator.*SigLIP2"):
        read(str(tmp_path / "gpt.pt"), params_like(SIZE))
    torch.save({"w": torch.ones(4, 2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is of no network known here"):
        read(str(tmp_path / "x.pt"), params_like(SIZE))


def test_it_is_no_tokenizer(theirs):
    from detailflow_jax.inference import api

    with pytest.raises(CheckpointError, match=r"looks like a SigLIP2.*config\.teacher\.path"):
        api.load_tokenizer(theirs[1]["both"])


def test_published_size():
    """The table covers SigLIP2-so400m in Hugging Face's names: names and shapes of their model."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    from detailflow_jax.convert import mapping
    from detailflow_jax.convert.tables import siglip as names

    with torch.device("meta"):
        model = Siglip2VisionModel(Siglip2VisionConfig(**vision_settings(siglip.ViTConfig())))
    want = {k: tuple(x.shape) for k, x in model.state_dict().items() if not k.startswith("head.")}
    assert mapping.published_shapes(names.trunk("", ""), params_like(siglip.ViTConfig())) == want
    encoder = NETWORKS["tokenizer"].abstract(TokenizerConfig(), scan=True)["encoder"]["trunk"]
    twelve = mapping.published_shapes(names.trunk("", ""), encoder)
    left = {k for k in want if k not in twelve}
    assert {int(k.split(".")[2]) for k in left} == set(range(12, 27))
