"""FlowAR's published names: read, written back, told by shapes; full-size models by rule."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

import detailflow_jax as df
import full_weights
import golden_files
from detailflow_jax.convert import mapping, registry, write_pytorch
from detailflow_jax.convert.__main__ import main as convert
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.settings import Settings
from detailflow_jax.convert.tables import flowar as names
from detailflow_jax.models.flowar import SIZES

SMALL = ("flowar_attn_mlp", "flowar_cross_attn")


@pytest.fixture(params=SMALL)
def recorded(request, tmp_path):
    """(file in the published form, the recorded state dict, its settings)."""
    _, settings, state = golden_files.read(request.param)
    path = tmp_path / "FlowAR.pth"
    write_pytorch(state, path, {}, more={"model_ema": state})
    return path, state, settings


def test_the_configuration_is_told_by_the_tensors(recorded):
    path, _, settings = recorded
    config = df.load_flowar(path).config
    sizes, head = settings["model"], settings["args"]
    assert (config.width, config.num_heads) == (sizes["encoder_embed_dim"], 4)
    assert (config.first_depth, config.second_depth) == (
        sizes["encoder_depth"],
        sizes["decoder_depth"],
    )
    assert (config.head_width, config.head_depth) == (head["diffloss_w"], head["diffloss_d"])
    assert config.scales == tuple(head["scale"]) and config.buffer_size == 0
    assert config.injection == ("spatial_cross" if head["cross"] else "spatial")


def test_written_back_every_bit_and_buffer_is_the_same(recorded, tmp_path):
    path, state, _ = recorded
    back = df.save_pytorch(df.load_flowar(path), tmp_path / "back")
    content = torch.load(back / "checkpoints" / "FlowAR.pt", weights_only=True)
    assert list(content) == ["model", "model_ema"]
    for weights in content.values():
        assert weights.keys() == state.keys()
        for name, x in state.items():
            got = weights[name].numpy()
            assert got.shape == x.shape and got.dtype == x.dtype, name
            if name.endswith("rope.freqs"):  # another library's power function
                np.testing.assert_allclose(got, x, rtol=1e-6)
            else:
                np.testing.assert_array_equal(got, x, err_msg=name)


def test_the_command_goes_both_ways(recorded, tmp_path):
    path, _, _ = recorded
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back.safetensors")
    assert convert(["--to", "jax", "--src", str(path), "--dst", ours]) == 0
    assert df.load_flowar(ours).fingerprint == df.load_flowar(path).fingerprint
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").unlink()
    assert convert(["--to", "pytorch", "--src", ours, "--dst", back]) == 0
    assert df.load_flowar(back).fingerprint == df.load_flowar(path).fingerprint


def test_weights_come_from_the_average_by_default(recorded, tmp_path):
    path, state, _ = recorded
    other = {name: x + 1 if x.ndim else x for name, x in state.items() if name != "mask"}
    both = tmp_path / "both"
    write_pytorch(other, both, {}, more={"model_ema": state})
    average = df.load_flowar(both).fingerprint
    assert average == df.load_flowar(path).fingerprint
    assert df.load_flowar(both, weights="model").fingerprint != average


def test_scales_that_the_rows_do_not_tell_are_asked_for(recorded, tmp_path):
    _, state, _ = recorded
    tables = {name: x[:, :21] for name, x in state.items() if "pos_embed" in name}
    write_pytorch(state | tables, tmp_path / "small", {})
    assert df.load_flowar(tmp_path / "small").config.scales == (1, 2, 4)
    tables = {name: x[:, :13] for name, x in tables.items()}
    write_pytorch(state | tables, tmp_path / "odd", {})
    with pytest.raises(CheckpointError, match=r"13 rows.*scales"):
        df.load_flowar(tmp_path / "odd")
    assert df.load_flowar(tmp_path / "odd", scales=(2, 3)).config.scales == (2, 3)


@pytest.mark.parametrize(
    "fields",
    [
        *({"scale": x} for x in (5, "12", [1, "2"], [[1], 2], [1, None], {"a": 1})),
        *({"buffer_size": x} for x in ("1", 1.5, [1])),
    ],
)
def test_scales_that_are_no_numbers(fields):
    settings = Settings({}, fields, {}, "x.pth", {})
    with pytest.raises(CheckpointError, match="expected a list of whole numbers, and a whole"):
        names._scales(settings, 5)


@pytest.mark.parametrize(
    ("name", "size"),
    [("flowar_s_full", "FlowAR-S"), ("flowar_l_full", "FlowAR-L")],
)
def test_full_size_names_and_shapes(name, size):
    wanted = full_weights.shapes(name)
    tensors = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in wanted.items()}
    config, _ = registry.NETWORKS["flowar"].infer(tensors, {}, {}, name)
    for field, value in SIZES[size].items():
        assert getattr(config, field) == value
    abstract = registry.NETWORKS["flowar"].abstract(config, scan=True)
    shapes = mapping.published_shapes(names.TABLE, abstract)
    shapes |= {key: x.shape for key, x in names.buffers(config).items()}
    assert shapes == wanted
    assert registry.NETWORKS["flowar"].file_name(config) == size


@pytest.mark.full
@pytest.mark.parametrize("name", ["flowar_s_full", "flowar_l_full"])
def test_full_size_sampling(name, tmp_path):
    arrays = dict(np.load(golden_files.FOLDER / f"{name}.npz"))
    derived = [key for key in full_weights.shapes(name) if key == "mask" or "rope." in key]
    state = full_weights.state_dict(name, not_filled=derived)
    for key in derived:
        del state[key]
    write_pytorch(state, tmp_path / "full.pth", {}, more={"model_ema": state})
    del state
    model = df.load_flowar(tmp_path / "full.pth")
    # One of the two recorded rows, which do not touch each other: this is much arithmetic.
    latents = model.sample(
        arrays["y"][:1],
        cfg_scale=float(arrays["cfg"]),
        num_steps=int(arrays["num_steps"]),
        guidance_high=float(arrays["guidance_high"]),
        noise=[arrays[f"noise{k}"][:1] for k in range(5)],
    )
    assert latents.shape == (1, 16, 16, 16)
    error = golden_files.error(latents, golden_files.nhwc(arrays["latent"])[:1])
    assert error <= golden_files.SAMPLED
    jax.clear_caches()


def test_a_head_without_published_counterpart_says_so():
    _, _, notices = names.describe(dataclasses.replace(names.FlowARConfig(), injection="add"))
    assert "no published counterpart" in notices[0]
    assert json.dumps(names.describe(names.FlowARConfig())[0])


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10}, {"head_dim": 32}, {"buffer_size": 4}, {"scales": (1, 4, 16)},
        {"channels": 4},
    ],
)  # fmt: skip
def test_what_the_published_code_does_not_build_is_said(change):
    assert names.describe(names.FlowARConfig())[2] == []
    (notice,) = names.describe(dataclasses.replace(names.FlowARConfig(), **change))[2]
    ((name, value),) = change.items()
    assert f"{name}={value} (not " in notice and "fails or samples are wrong" in notice
    (notice,) = names.describe(dataclasses.replace(names.FlowARConfig(), head_depth=3))[2]
    assert "none of FlowAR-S, FlowAR-L, FlowAR-H" in notice


def test_bare_for_evaluation_and_wrapped_for_training(recorded, tmp_path, capsys):
    path, state, _ = recorded
    command = ["--to", "pytorch", "--src", str(path), "--dst"]
    assert convert([*command, str(tmp_path / "bare" / "x.pth"), "--bare"]) == 0
    assert "eval.py" not in capsys.readouterr().err
    assert torch.load(tmp_path / "bare" / "x.pth", weights_only=True).keys() == state.keys()
    assert convert([*command, str(tmp_path / "wrapped" / "x.pth")]) == 0
    assert "eval.py reads a bare state dict: write one with --bare" in capsys.readouterr().err
    wrapped = torch.load(tmp_path / "wrapped" / "x.pth", weights_only=True)
    assert list(wrapped) == ["model", "model_ema"]
    model = df.load_flowar(path)
    df.save_pytorch(model, tmp_path / "again" / "x.pth", bare=True)
    assert torch.load(tmp_path / "again" / "x.pth", weights_only=True).keys() == state.keys()
    assert df.load_flowar(tmp_path / "again" / "x.pth").fingerprint == model.fingerprint
    with pytest.raises(CheckpointError, match="bare state dict has no keys such as ema"):
        df.save_pytorch(model, tmp_path / "b.pth", bare=True, keys=["ema"])
