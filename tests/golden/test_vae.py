"""The KL autoencoder against recorded numbers, small and at full size."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import detailflow_jax as df
import full_weights
import golden_files
from detailflow_jax.convert import mapping
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.tables import vae as names
from detailflow_jax.models.vae import VAE, VAEConfig

TOLERANCE = golden_files.VAE


def network(state_dict, **fields):
    """The module and its parameters, from published tensors."""
    config, _ = NETWORKS["vae"].infer(state_dict, {"scale_factor": 1.0} | fields, {}, "golden")
    model = VAE(config)
    side = config.stride
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    params, report = mapping.from_published(names.TABLE, state_dict, nn.unbox(init)["params"])
    assert not report.missing and not report.unused
    return model, {"params": params}


@functools.cache
def small():
    arrays, settings, state_dict = golden_files.read("vae_kl16")
    return arrays, settings, state_dict, *network(state_dict)


def test_the_configuration_is_told_by_the_tensors():
    _, settings, _, model, _ = small()
    want = VAEConfig(
        channels=settings["ch"],
        multipliers=tuple(settings["ch_mult"]),
        scale_factor=1.0,
        encoder_attention=(4,),
        decoder_attention=(),
    )
    assert model.config == want


def test_moments_and_kl():
    arrays, _, _, model, params = small()
    posterior = jax.jit(functools.partial(model.apply, method="encode"))(
        params, golden_files.nhwc(arrays["x"])
    )
    for field in ("mean", "logvar"):
        got = getattr(posterior, field)
        assert golden_files.error(got, golden_files.nhwc(arrays[field])) <= TOLERANCE
    assert golden_files.error(posterior.kl(), arrays["kl"]) <= TOLERANCE


def test_reconstruction():
    arrays, _, _, model, params = small()
    images, _ = jax.jit(model.apply)(params, golden_files.nhwc(arrays["x"]))
    assert golden_files.error(images, golden_files.nhwc(arrays["recon"])) <= TOLERANCE


def test_names_written_back_are_those_read():
    _, _, state_dict, _, params = small()
    back = mapping.to_published(names.TABLE, params["params"])
    assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in state_dict.items()}
    for name, x in state_dict.items():
        np.testing.assert_array_equal(back[name], np.asarray(x, np.float32))


@pytest.mark.full
def test_full_size_from_a_published_file_and_back(tmp_path):
    """As KL-16 is published: one file, its weights under `model`, no configuration."""
    arrays, _, _ = golden_files.read("vae_kl16_full")
    state = full_weights.state_dict("vae_kl16_full")
    torch.save({"model": {k: torch.from_numpy(x) for k, x in state.items()}}, tmp_path / "a.ckpt")
    vae = df.load_vae(tmp_path / "a.ckpt")
    assert vae.config == VAEConfig()
    moments = dict(zip(("mean", "logvar"), vae.encode(arrays["image"], batch_size=1), strict=True))
    for field, got in moments.items():
        assert golden_files.error(got, golden_files.nhwc(arrays[field])) <= TOLERANCE, field
    images = vae.decode(moments["mean"] * vae.config.scale_factor, batch_size=1)
    assert golden_files.error(images, golden_files.nhwc(arrays["recon"])) <= TOLERANCE

    written = torch.load(df.save_pytorch(vae, tmp_path / "b.ckpt"), weights_only=True)
    assert list(written) == ["model"]
    assert {k: tuple(x.shape) for k, x in written["model"].items()} == full_weights.shapes(
        "vae_kl16_full"
    )
    for name, x in state.items():
        assert torch.equal(written["model"][name], torch.from_numpy(x)), name
    jax.clear_caches()
