"""Autoencoders of diffusers: read, compared with diffusers at random weights, written back."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderDC, AutoencoderKL

import detailflow_jax as df
import golden_files
import small_tasks
from detailflow_jax import data
from detailflow_jax.convert import CheckpointError, start
from detailflow_jax.convert.__main__ import main
from detailflow_jax.convert.complete import complete
from detailflow_jax.inference import extract_latents
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime.config import check_same, load_config, write_config
from detailflow_jax.tasks import make_task

SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
PLAIN = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
MIXED = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX |= {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PER_CHANNEL = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 4.0]}
KL = {
    "sd": PLAIN,
    "flux": PLAIN | FLUX,
    "attention": MIXED | {"use_quant_conv": False, "layers_per_block": 2},
    "channels": PLAIN | PER_CHANNEL | {"mid_block_add_attention": False, "scaling_factor": 0.5},
}


def both(**fields):
    """The fields of encoder and decoder."""
    return {f"{part}_{name}": x for part in ("encoder", "decoder") for name, x in fields.items()}


RES, VIT = "ResBlock", "EfficientViTBlock"
SANA = {"latent_channels": 8, "attention_head_dim": 16, "scaling_factor": 0.41407}
SANA |= both(block_types=(RES, VIT), block_out_channels=(32, 64), qkv_multiscales=((), (5,)))
SANA |= {"encoder_layers_per_block": (1, 2), "decoder_layers_per_block": (2, 1)}
SANA |= {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
# As those for ImageNet: nothing at full size, pixels moved into channels, batch norms.
IMAGENET = {"latent_channels": 8, "attention_head_dim": 16, "scaling_factor": 0.3189}
IMAGENET |= both(block_types=(RES, RES, VIT), block_out_channels=(16, 32, 64))
IMAGENET |= both(layers_per_block=(0, 1, 1), qkv_multiscales=((), (), ()))
IMAGENET |= {"decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm")}
IMAGENET |= {"decoder_act_fns": ("relu", "relu", "silu"), "decoder_conv_act_fn": "silu"}
DC = {
    "sana": SANA,
    "imagenet": IMAGENET,
    "plain": SANA | {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
}


def randomise(model):
    """Weights as they are drawn, and norms and biases that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.ndim == 1:
                x.add_(0.1 * torch.rand(x.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name of a variant -> (diffusers' model, its folder)."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("diffusers")
    models = {k: randomise(AutoencoderKL(**SMALL | v)) for k, v in KL.items()}
    models |= {k: randomise(AutoencoderDC(**v)) for k, v in DC.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: (model, root / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def loaded(saved):
    return {name: df.load_vae(folder) for name, (_, folder) in saved.items()}


def copied(saved, folder, name="sd", **fields):
    """A copy of a folder whose config.json has other fields; None removes one."""
    shutil.copytree(saved[name][1], folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    text = json.dumps({key: x for key, x in config.items() if x is not None})
    (folder / "config.json").write_text(text)
    return folder


def images(height, width):
    return np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def scaled(model, z):
    """Latents as diffusers' pipelines scale them."""
    c = model.config
    if isinstance(model, AutoencoderDC):
        return z * c.scaling_factor
    if c.latents_mean:
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (c.latents_mean, c.latents_std))
        return (z - mean) * c.scaling_factor / std
    return (z - (c.shift_factor or 0)) * c.scaling_factor


def moments(model, x):
    """Mean and log-variance of diffusers' latents."""
    if isinstance(model, AutoencoderDC):
        mean = model.encode(to_torch(x)).latent
        return mean, torch.full_like(mean, -30)
    posterior = model.encode(to_torch(x)).latent_dist
    return posterior.mean, posterior.logvar


SIZES = [*((name, (8, 24)) for name in (*KL, *DC)), ("sd", (16, 16)), ("imagenet", (16, 16))]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_the_numbers_of_diffusers(saved, loaded, name, size):
    model, vae, x = saved[name][0], loaded[name], images(*size)
    with torch.no_grad():
        want = moments(model, x)
        decoded = model.decode(want[0]).sample
    posterior = vae.encode(x)
    for got, theirs in zip(posterior, want, strict=True):
        assert golden_files.error(got, golden_files.nhwc(theirs)) <= golden_files.VAE
    latents = golden_files.nhwc(scaled(model, want[0]))
    assert golden_files.error(posterior.mode(), latents) <= golden_files.VAE
    assert golden_files.error(vae.decode(latents), golden_files.nhwc(decoded)) <= golden_files.VAE


@pytest.mark.parametrize("name", [*KL, *DC])
def test_written_back_it_is_the_same(saved, loaded, name, tmp_path):
    model, vae = saved[name][0], loaded[name]
    folder = df.save_diffusers(vae, tmp_path / "out")
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in again.state_dict().items())
    known = {*SMALL, *PLAIN, *FLUX, "mid_block_add_attention"} - {"scaling_factor"}
    if name in DC:
        known = {*model.config} - {"_use_default_values", "_name_or_path", "_diffusers_version"}
    plain = json.loads(model.to_json_string())  # lists, as the file has them
    for field in known:
        said = again.config[field]
        each = isinstance(said, list) and isinstance(plain[field], str)  # one for all levels
        assert said == ([plain[field]] * len(said) if each else plain[field]), field
    np.testing.assert_allclose(scaled(again, torch.ones(1, 1)), scaled(model, torch.ones(1, 1)))
    read = df.load_vae(folder)
    assert read.fingerprint == vae.fingerprint
    np.testing.assert_allclose(read.config.scale_factor, vae.config.scale_factor, rtol=1e-15)


def test_other_files_of_a_folder(saved, loaded, tmp_path):
    """A PyTorch file, shards, a file alone; half precision beside the weights; a pipeline."""
    model, want = saved["sd"][0], loaded["sd"]
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    halves = copied(saved, tmp_path / "halves")
    (halves / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    alone = halves / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "bin", tmp_path / "shards", halves, alone):
        vae = df.load_vae(path)
        assert vae.fingerprint == want.fingerprint and vae.config == want.config
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="This is a pipeline: name its folder vae"):
        df.load_vae(tmp_path / "pipeline")


def test_names_before_diffusers_0_17(saved, loaded, tmp_path):
    """As in stabilityai/sd-vae-ft-mse; diffusers itself reads them too."""
    folder = copied(saved, tmp_path / "old")
    file = folder / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, x in safetensors.torch.load_file(file).items():
        for theirs, old in new.items():
            name = name.replace(f"attentions.0.{theirs}.", f"attentions.0.{old}.")
        state[name] = x
    assert sum("query" in name for name in state) == 4
    safetensors.torch.save_file(state, file)
    assert df.load_vae(folder).fingerprint == loaded["sd"].fingerprint


def test_without_a_configuration(saved, tmp_path):
    """The tensors tell all but scale, shift and groups."""
    file = shutil.copy(saved["flux"][1] / "diffusion_pytorch_model.safetensors", tmp_path)
    told = {"shift_factor": 0.1159, "norm_groups": 8}
    with pytest.raises(CheckpointError, match=r"nothing tells scale_factor.*FLUX: 0\.3611 with"):
        df.load_vae(file, **told)
    assert (
        df.load_vae(file, scale_factor=0.3611, **told).config
        == df.load_vae(saved["flux"][1]).config
    )


def test_the_command_makes_a_folder_of_diffusers(saved, loaded, tmp_path, capsys):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["--to", "jax", "--src", str(saved["channels"][1]), "--dst", ours]) == 0
    assert df.load_vae(ours).config == loaded["channels"].config
    assert main(["--to", "diffusers", "--src", ours, "--dst", back]) == 0
    assert df.load_vae(back).fingerprint == loaded["channels"].fingerprint
    assert main(["--to", "diffusers", "--src", ours, "--dst", back]) == 2
    assert "back: exists already" in capsys.readouterr().err
    ours = str(tmp_path / "dc")
    assert main(["--to", "jax", "--src", str(saved["sana"][1]), "--dst", ours]) == 0
    assert df.load_vae(ours).config == loaded["sana"].config
    assert main(["--to", "pytorch", "--src", ours, "--dst", str(tmp_path / "x.pt")]) == 2
    assert "diffusers alone. Write that: df.save_diffusers" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ FlowAR

TINY = [
    *("--config.model.width=16", "--config.model.num_heads=2", "--config.model.first_depth=1"),
    *("--config.model.second_depth=1", "--config.model.head_width=16", "--config.batch_size=4"),
    *("--config.model.head_depth=1", "--config.model.head_dim=8"),
]


def flowar(source, folder, *more):
    """The configuration of a FlowAR that says nothing of its latents."""
    options = [*TINY, f"--config.data.source={source}", f"--config.vae.path={folder}", *more]
    return complete(load_config("configs/flowar.py:digits", options))


@pytest.mark.parametrize(
    ("name", "side", "channels"),
    [("imagenet", 2, 8), pytest.param("flux", 4, 16, marks=pytest.mark.full)],
)
def test_flowar_trains_on_its_latents(saved, tmp_path, name, side, channels):
    """Stride, channels and scales come from the autoencoder, and so do the frozen weights."""
    config = flowar("digits", saved[name][1], "--config.data.image_size=8")
    assert config.model.channels == channels and config.model.scales[-1] == side
    task = make_task(config)
    state = start.load_into(config, small_tasks.start(task), (), fresh=True)
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (4, 8, 8, 3), np.uint8), "label": np.arange(4)}
    task.check(batch)
    new, metrics = jax.jit(functools.partial(task.train_step, variant=None))(state, batch, {})
    assert np.isfinite(metrics["loss"]) and int(new.step) == 1
    if name == "imagenet":  # nothing is drawn
        pictures = (batch["image"] / 127.5 - 1).astype(np.float32)
        with torch.no_grad():
            z = scaled(saved[name][0], moments(saved[name][0], pictures)[0])
        assert float(metrics["latent_std"]) == pytest.approx(float(z.std(correction=0)), rel=1e-3)
    write_config(config, tmp_path)
    check_same(flowar("digits", saved[name][1], "--config.data.image_size=8"), tmp_path)


class Few(data.Source):
    """The first four digits."""

    name = fingerprint = "few"

    def __init__(self):
        self.digits = data.make_source("digits", "train", None)
        self.class_names = self.digits.class_names

    def __len__(self):
        return 4

    def read(self, index, reduce_to=None):
        return self.digits.read(index, reduce_to)


@pytest.mark.parametrize("name", ["channels", "sana"])
def test_flowar_trains_on_latents_that_were_extracted(saved, loaded, tmp_path, name):
    vae, out = loaded[name], str(tmp_path / "latents")
    manifest = extract_latents.extract(vae, Few(), out, image_size=8, batch_size=4)
    per_channel = (4,) if name == "channels" else ()
    assert np.shape(manifest["scale_factor"]) == np.shape(manifest["shift_factor"]) == per_channel
    options = {"source": f"latents:{out}", "num_workers": 0, "prefetch": 1, "flip": False}
    batch = next(data.make_iterator(options, batch_size=4, seed=0))
    got = np.split(batch["moments"], 2, axis=-1)[0]
    stored = [data.LatentSource(out)[i]["moments"][0] for i in range(4)]
    want = np.asarray(vae.network.scale(np.split(np.stack(stored), 2, axis=-1)[0]))
    in_order = lambda x: x[np.lexsort(x.reshape(4, -1).T)]  # noqa: E731
    np.testing.assert_allclose(in_order(got), in_order(want), rtol=1e-5, atol=1e-6)
    config = flowar(f"latents:{out}", saved[name][1])
    assert config.vae.scale_factor == vae.config.scale_factor
    assert config.model.scales == (1, 2, 4)
    make_task(config).check(batch)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, r"_class_name='AutoencoderTiny', its tensors are nam"),
        (
            {"act_fn": "relu"},
            "act_fn=.relu., so its activations are others; expected act_fn=.silu",
        ),
        ({"out_channels": 4}, "out_channels=4, unlike in_channels"),
        ({"latent_channels": 8}, "latent_channels=8, the weights themselves say 4"),
        ({"in_channels": 1, "out_channels": 1}, "in_channels=1, the weights themselves say 3"),
        ({"layers_per_block": 2}, "layers_per_block=2, the weights themselves say 1"),
        ({"block_out_channels": [32, 32]}, r"block_out_channels=\[32, 32\], .* say \[32, 64\]"),
        ({"use_quant_conv": False}, "use_quant_conv=False, the weights themselves say True"),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]},
            r"up_block_types=\['AttnUp.* say \['UpDecoderBlock2D', 'UpDec",
        ),
        ({"norm_num_groups": 5}, "not a multiple of norm_groups=5"),
        ({"scaling_factor": 0}, "scale_factor=0; expected float above 0"),
        ({"latents_mean": [0, 0, 0, 0]}, "only one of latents_mean and latents_std"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, r"latents_mean=\[0\.0\]; expected 4 numb"),
        *(
            ({name: x, "latents_mean": [0] * 4, "latents_std": [1] * 4}, f"{name}=.* one number")
            for name, x in (("scaling_factor", "x"), ("scaling_factor", [1]), ("shift_factor", "x"))
        ),
        (
            {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 0, 1]},
            r"latents_std=.*one per latent channel, above 0",
        ),
    ],
)
def test_configurations_that_cannot_be(saved, tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        df.load_vae(copied(saved, tmp_path / "x", **fields))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": None}, "a DC-AE without its configuration; expected the config.json"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL', its tensors are named"),
        ({"latent_channels": 16}, "latent_channels=16, the weights themselves say 8"),
        ({"in_channels": 1}, "in_channels=1, the weights themselves say 3"),
        ({"encoder_block_out_channels": [32, 48]}, r"encoder_widths=\(32, 48\): 48 follows 32"),
        (
            {"encoder_block_out_channels": [32, 128]},
            r"conv_out.* \(8, 64, 3, 3\); expected \(8, 128",
        ),
        ({"encoder_layers_per_block": 2}, "encoder_layers_per_block=2; expected a list of whole"),
        ({"encoder_block_out_channels": [32]}, r"encoder_qkv_multiscales=.* expected 1 lists"),
        ({"encoder_layers_per_block": [2, 2]}, r"tensors are missing: encoder\.down_blocks\.0\.2"),
        ({"encoder_block_types": "Conv"}, "encoder_block_types has 'Conv'; expected ResBlock or"),
        ({"decoder_act_fns": "gelu"}, r"decoder_activations: .*gelu.* expected relu or silu"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norms: .*layer_norm.* expected rms_norm"),
        ({"encoder_qkv_multiscales": [[], [3, 5]]}, "expected 2 lists of at most one number"),
        ({"encoder_qkv_multiscales": [[], ["5"]]}, "expected 2 lists of at most one number"),
        ({"encoder_qkv_multiscales": 5}, "multiscales=5; expected 2 lists of at most one number"),
        ({"encoder_block_types": 5}, "encoder_block_types=5; expected a text, or one per level"),
        ({"decoder_act_fns": [["relu"]]}, "decoder_act_fns=.* expected a text, or one per level"),
        ({"attention_head_dim": 24}, "a multiple of head_dim=24"),
        ({"attention_head_dim": "x"}, "head_dim='x'; expected int from 1"),
        ({"scaling_factor": 0}, "scale_factor=0; expected float above 0"),
    ],
)
def test_configurations_of_dc_ae_that_cannot_be(saved, tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        df.load_vae(copied(saved, tmp_path / "x", "sana", **fields))
    assert "\n" not in str(raised.value)


def test_what_a_configuration_of_dc_ae_has_no_field_for(saved, tmp_path):
    vae = df.load_vae(saved["sana"][1], shift_factor=0.5)
    assert vae.config.shift_factor == 0.5
    with pytest.raises(CheckpointError, match=r"shift_factor=0\.5.*expected no shift"):
        df.save_diffusers(vae, tmp_path / "x")


@pytest.mark.parametrize("name", ["scale_factor", "shift_factor"])
def test_as_many_numbers_as_channels(name):
    with pytest.raises(ValueError, match=f"{name} has 2 values, expected one or 3, one per latent"):
        VAEConfig(latent_channels=3, **{name: (1.0, 2.0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_norm_out.bias": None}, r"1 of \d+ tensors are missing: decoder\.conv_norm"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": None}, "conv1.weight' is missing"),
        ({"bn.running_mean": torch.zeros(4)}, r"belong to no parameter: bn\.running_mean"),
        (
            {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(24, 32, 3, 3)},
            r"block_out_channels=\[32, 64\], the weights themselves say \[24, 64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(saved, tmp_path, change, message):
    folder = copied(saved, tmp_path / "x")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(file) | change
    safetensors.torch.save_file({k: x for k, x in state.items() if x is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        df.load_vae(folder)


def test_a_network_that_is_not_known(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file({"encoder.layers.0.weight": torch.ones(1)}, file)
    message = r"no network known here, its config\.json calls it AutoencoderTiny.*expected a lat"
    with pytest.raises(CheckpointError, match=message):
        df.load_vae(tmp_path)


def test_what_is_no_autoencoder_is_not_written(tmp_path):
    from scored_models import generator

    with pytest.raises(CheckpointError, match=r"generator is no network of diffusers; expected an"):
        df.save_diffusers(generator(), tmp_path / "x")
