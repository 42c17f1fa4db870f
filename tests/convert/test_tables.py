"""Tables: every published name and shape, both layouts of the parameters, no bit lost."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

import full_weights
from convert_models import random_params
from detailflow_jax.convert import CheckpointError, export, mapping, published
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.models import layers
from detailflow_jax.models.generator import SIZES, GeneratorConfig
from detailflow_jax.models.siglip import ViTConfig
from detailflow_jax.models.tokenizer import TokenizerConfig
from detailflow_jax.models.vae import VAEConfig

WIDE = TokenizerConfig(  # the other published layout: the whole of SigLIP2, a decoder as wide
    num_tokens=256, encoder=ViTConfig(), decoder=ViTConfig(depth=12)
)
SMALL_TOKENIZER = TokenizerConfig(
    image_size=32,
    num_tokens=8,
    group_size=4,
    codebook_size=16,
    codebook_dim=5,
    resolution_power=1.25,
    encoder=ViTConfig(12, 3, 2, 20, patch_size=8, table_side=4),
    decoder=ViTConfig(8, 2, 4, 28, patch_size=4, table_side=3),
)
DEEP_ENCODER = dataclasses.replace(
    SMALL_TOKENIZER,
    causal_num=8,
    encoder=ViTConfig(10, 5, 5, 44, patch_size=8, table_side=2),
    decoder=ViTConfig(10, 2, 5, 44, patch_size=8, table_side=2),
)
SMALL_GENERATOR = GeneratorConfig(
    width=24, depth=3, num_heads=6, num_kv_heads=2, multiple_of=32, num_tokens=12, group_size=4,
    causal_num=8, codebook_size=20, num_classes=7,
)  # fmt: skip
ONE_BY_ONE = dataclasses.replace(
    SMALL_GENERATOR, num_kv_heads=None, group_size=1, causal_num=1, multiple_of=256
)
SMALL_VAE = VAEConfig(
    channels=12, multipliers=(1, 3, 2), res_blocks=1, latent_channels=5, norm_groups=6,
    scale_factor=0.7, shift_factor=-0.1, quant_conv=False, encoder_attention=(),
    decoder_attention=(0, 2),
)  # fmt: skip
SMALL = [
    ("tokenizer", SMALL_TOKENIZER), ("tokenizer", DEEP_ENCODER),
    ("generator", SMALL_GENERATOR), ("generator", ONE_BY_ONE),
    ("vae", SMALL_VAE),
]  # fmt: skip


def state_shapes(kind, config):
    """Published name -> shape of what is written, buffers included."""
    names = NETWORKS[kind]
    abstract = NETWORKS[kind].abstract(config, scan=True)
    return mapping.published_shapes(names.table, abstract) | {
        k: x.shape for k, x in names.buffers(config).items()
    }


def abstract_tensors(kind, config):
    shapes = state_shapes(kind, config)
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def assert_same_bits(a, b):
    a, b = mapping.flatten(a), mapping.flatten(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert x.dtype == b[path].dtype and x.tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize(
    ("kind", "config", "recorded"),
    [
        ("tokenizer", TokenizerConfig(), "detailflow_128_tokenizer_full"),
        ("generator", GeneratorConfig(), "detailflow_128_gpt_l_full"),
        ("vae", VAEConfig(), "vae_kl16_full"),
    ],
)
def test_names_and_shapes_are_the_published_ones(kind, config, recorded):
    assert state_shapes(kind, config) == full_weights.shapes(recorded)


def test_names_of_the_wide_layout():
    shapes = state_shapes("tokenizer", WIDE)
    assert shapes["encoder.visual_model.encoder.layers.26.mlp.fc2.weight"] == (1152, 4304)
    assert "encoder.visual_model.encoder.layers.27.mlp.fc2.weight" not in shapes
    assert shapes["decoder.visual_model.encoder.layers.11.mlp.fc1.weight"] == (4304, 1152)
    assert shapes["decoder.to_pixel.model.weight"] == (768, 1152)
    assert shapes["post_quant_conv.weight"] == (1152, 8)
    assert shapes["encoder.latent_tokens"] == (1, 256, 1152)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("tokenizer", TokenizerConfig()),
        ("tokenizer", TokenizerConfig(num_tokens=512, causal_num=16)),
        ("tokenizer", WIDE),
        ("tokenizer", dataclasses.replace(TokenizerConfig(), encoder=ViTConfig(depth=16))),
        ("vae", VAEConfig()),
        *SMALL,
        ("generator", dataclasses.replace(SMALL_GENERATOR, causal_num=0)),
        *(("generator", GeneratorConfig(**size)) for size in SIZES.values()),
    ],
)
def test_configuration_survives_the_published_one(kind, config):
    """What `describe` writes, `infer_config` reads, without an override or an assumption."""
    names = NETWORKS[kind]
    both, extra, _ = names.describe(config)
    read, notices = names.infer(abstract_tensors(kind, config), both | extra, {}, "here")
    assert read == config and notices == []


def test_configuration_is_what_the_published_loaders_take():
    """They pass config.json on as keyword arguments, less some names that must be there."""
    both, extra, _ = NETWORKS["tokenizer"].describe(TokenizerConfig())
    assert both.keys() == {
        "image_size", "max_image_size", "codebook_size", "codebook_embed_dim", "encoder_ch_mult",
        "decoder_ch_mult", "enc_type", "dec_type", "encoder_model", "decoder_model",
        "num_latent_tokens", "enc_pretrained", "dec_pretrained", "enc_patch_size",
        "dec_patch_size", "causal_encoder", "causal_decoder", "group_size", "causal_num",
        "global_token_loss_weight", "correction_training",
    }  # fmt: skip
    assert (both["encoder_model"], both["enc_pretrained"]) == ("siglip2_base", True)
    assert (both["decoder_model"], both["dec_pretrained"]) == ("siglip2_base", False)
    assert both["global_token_loss_weight"] == 0  # else it would ask for the teacher's weights
    asked = {"vq_model", "content_degradation", "enc_type", "max_image_size", "min_image_size",
             "num_latent_tokens", "group_size", "degradation_power"}  # fmt: skip
    assert asked <= (both | extra).keys()
    wide, _, notices = NETWORKS["tokenizer"].describe(WIDE)
    assert (wide["encoder_model"], wide["enc_pretrained"]) == ("siglip2", True)
    assert (wide["decoder_model"], wide["dec_pretrained"]) == ("siglip2_base", True)
    assert notices == []

    both, extra, _ = NETWORKS["generator"].describe(GeneratorConfig())
    assert both.keys() == {
        "dim", "n_layer", "n_head", "n_kv_head", "multiple_of", "vocab_size", "block_size",
        "num_classes", "group_size", "causal_num", "cls_token_num",
    }  # fmt: skip
    assert extra["gpt_model"] == "GPT-L"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [("num_kv_heads", 4, True), ("num_kv_heads", 16, False), ("multiple_of", 64, True)],
)
def test_a_generator_with_the_size_but_not_the_shapes_of_a_name(field, value, told):
    config = GeneratorConfig(**SIZES["GPT-L"], **{field: value})
    _, extra, notices = NETWORKS["generator"].describe(config)
    assert extra == {"gpt_model": "GPT-L"}
    assert [f"{field}={value}" in notice for notice in notices] == [True] * told


@pytest.mark.parametrize(("kind", "config"), SMALL)
@pytest.mark.parametrize(
    ("file", "scan"),
    [
        ("out", True),
        ("x.pt", False),
        pytest.param("x.safetensors", True, marks=pytest.mark.full),
    ],
)
def test_round_trip_is_bit_exact(tmp_path, kind, config, file, scan):
    params = random_params(kind, config, scan=scan)
    export.export(kind, config, params, tmp_path / file)
    for layout in (scan, not scan):
        read = published.read(kind, tmp_path / file, scan=layout)
        assert read.config == config
        relaid = params
        if layout != scan:
            relaid = (layers.stack_layers if layout else layers.unstack_layers)(params)
        assert_same_bits(read.params, relaid)
        assert read.notices == [] or file.endswith("safetensors")  # that holds one set


def test_written_tensors_are_what_pytorch_means(tmp_path):
    """By hand, not by the table: a linear layer is [out, in], fused rows are q, k, v."""
    params = random_params("generator", SMALL_GENERATOR, scan=True)
    export.export("generator", SMALL_GENERATOR, params, tmp_path / "x.safetensors")
    state = {
        k: x.numpy() for k, x in safetensors.torch.load_file(tmp_path / "x.safetensors").items()
    }
    attention = params["blocks"]["layers"]["attention"]
    rows = [attention[f"{part}_proj"]["kernel"][1].T for part in "qkv"]
    np.testing.assert_array_equal(state["layers.1.attention.wqkv.weight"], np.concatenate(rows))
    np.testing.assert_array_equal(state["output.weight"], params["output"]["kernel"].T)
    np.testing.assert_array_equal(
        state["tok_embeddings.weight"], params["token_embedding"]["embedding"]
    )
    params = random_params("tokenizer", SMALL_TOKENIZER, scan=False)
    export.export("tokenizer", SMALL_TOKENIZER, params, tmp_path / "b" / "x.pt")
    state = torch.load(tmp_path / "b" / "x.pt", weights_only=True)["model"]
    np.testing.assert_array_equal(
        state["encoder.latent_tokens"].numpy()[0], params["encoder"]["latent_tokens"]
    )
    fc1 = params["decoder"]["trunk"]["blocks"]["layers_1"]["fc1"]["kernel"]
    name = "decoder.visual_model.encoder.layers.1.mlp.fc1.weight"
    np.testing.assert_array_equal(state[name].numpy(), fc1.T)
    assert not state["quantize.codebook_used"].any()
    assert state["quantize.codebook_used"].shape == (65536,)


def test_generators_average_is_written_once(tmp_path):
    params = random_params("generator", SMALL_GENERATOR, scan=True)
    export.export("generator", SMALL_GENERATOR, params, tmp_path / "out")
    content = torch.load(tmp_path / "out" / "checkpoints" / "12.pt", weights_only=True)
    assert list(content) == ["model", "ema"]
    assert all(content["ema"][k].data_ptr() == x.data_ptr() for k, x in content["model"].items())


def test_alignment_is_left_out_and_told(tmp_path):
    config = dataclasses.replace(SMALL_TOKENIZER, teacher_width=6)
    params = random_params("tokenizer", config, scan=True)
    done = export.export("tokenizer", config, params, tmp_path / "out")
    want = {f"global_token_proj.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert set(done.left_out) == want
    assert done.buffers == ["quantize.codebook_used"]
    read = published.read("tokenizer", tmp_path / "out").params
    assert_same_bits(read, {k: x for k, x in params.items() if not k.startswith("align")})


def test_parameters_are_in_memory_that_is_taken_over():
    """No second copy of the weights: the arrays that are read become the device's own."""
    config = SMALL_GENERATOR
    tensors = mapping.to_published(
        NETWORKS["generator"].table, random_params("generator", config, scan=True)
    )
    for scan in (True, False):
        params, _ = mapping.from_published(
            NETWORKS["generator"].table, tensors, NETWORKS["generator"].abstract(config, scan=scan)
        )
        for leaf in jax.tree.leaves(params):
            assert jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data


def test_a_parameter_without_a_name_is_noticed():
    abstract = NETWORKS["generator"].abstract(SMALL_GENERATOR, scan=True)
    abstract["extra"] = {"kernel": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(ValueError, match="names no published tensor for extra/kernel"):
        mapping.from_published(NETWORKS["generator"].table, {}, abstract)


def test_what_is_not_real_numbers_is_refused():
    config = SMALL_GENERATOR
    tensors = mapping.to_published(
        NETWORKS["generator"].table, random_params("generator", config, scan=True)
    )
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.complex64)
    with pytest.raises(
        CheckpointError, match=r"'norm\.weight' is complex64; expected real numbers"
    ):
        mapping.from_published(
            NETWORKS["generator"].table, tensors, NETWORKS["generator"].abstract(config, scan=True)
        )
