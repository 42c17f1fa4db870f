"""Published checkpoints through `df.load_*`: the recorded numbers, the choices, clear errors."""

import argparse
import json
import random
import shutil
import time

import numpy as np
import pytest
import safetensors.torch
import torch

import detailflow_jax as df
import golden_files
from convert_models import TOKENIZER_HEADS, published, recorded
from damage import corrupt
from detailflow_jax.convert import CheckpointError, registry
from detailflow_jax.convert import published as published_lib


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return published(tmp_path_factory.mktemp("a") / "tok", "tokenizer_a")


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory):
    return published(tmp_path_factory.mktemp("b") / "gen", "generator_a")


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that loading logs."""
    said = []
    monkeypatch.setattr(
        "detailflow_jax.inference.api.logging.warning", lambda text, *args: said.append(text % args)
    )
    return said


# -------------------------------------------------------------------------------- the right numbers


def test_tokenizer_gives_the_recorded_codes_and_images(tokenizer_folder, warnings):
    arrays, _, _ = golden_files.read("tokenizer_a")
    tokenizer = df.load_tokenizer(tokenizer_folder, **TOKENIZER_HEADS)
    assert warnings == []
    codes = tokenizer.encode(golden_files.nhwc(arrays["x"]))
    np.testing.assert_array_equal(codes, arrays["indices"].reshape(codes.shape))
    images = tokenizer.decode(codes[:, :16], size=48)
    assert golden_files.error(images, golden_files.nhwc(arrays["dec_t16_r48"])) < 1e-5


@pytest.mark.parametrize("name", ["generator_a", "generator_causal8"])
def test_generator_gives_the_recorded_logits_and_codes(tmp_path, name, warnings):
    arrays, settings, _ = golden_files.read(name)
    generator = df.load_generator(published(tmp_path / "gen", name))
    assert warnings == [f"{generator.source}: holds no 'ema' weights; reading 'model'"]
    logits = generator.logits(arrays["idx"], arrays["cond"])
    assert golden_files.error(logits, arrays["logits"]) < golden_files.GENERATOR
    codes = generator.sample(arrays["cond"], cfg_scale=settings["cfg_scale"], greedy=True)
    np.testing.assert_array_equal(codes, arrays["greedy"])


def fuller(state):
    return {f"_orig_mod.module.{name}": torch.from_numpy(x) for name, x in state.items()}


@pytest.mark.parametrize("form", ["folder", "file", "pth", "safetensors", "shards", "ckpt"])
def test_every_form_is_the_same_generator(tmp_path, generator_folder, form):
    state, settings = recorded("generator_a")
    path = tmp_path / {"folder": "", "shards": ""}.get(form, f"x.{form}")
    tensors = {name: torch.from_numpy(x) for name, x in state.items()}
    if form == "folder":
        path = generator_folder
    elif form == "file":
        path = generator_folder / "checkpoints" / "32.pt"
    elif form == "pth":
        # As a trainer leaves it: both sets, an optimizer, arguments, prefixes.
        args = argparse.Namespace(**settings, lr=1e-4)
        torch.save({"ema": fuller(state), "optimizer": [{}], "steps": 7, "args": args}, path)
    elif form == "ckpt":
        args = argparse.Namespace(**settings)
        torch.save({"state_dict": tensors, "args": args}, path,
                   _use_new_zipfile_serialization=False)  # fmt: skip
    elif form == "safetensors":
        safetensors.torch.save_file(tensors, path)
        (tmp_path / "config.json").write_text(json.dumps(settings))
    else:
        halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for half, file in zip(halves, files, strict=True):
            safetensors.torch.save_file(half, tmp_path / file)
        index = {name: file for h, file in zip(halves, files, strict=True) for name in h}
        text = json.dumps({"weight_map": index})
        (tmp_path / "model.safetensors.index.json").write_text(text)
        (tmp_path / "config.json").write_text(json.dumps(settings))
    generator = df.load_generator(path)
    assert generator.fingerprint == df.load_generator(generator_folder).fingerprint


def test_which_weights_are_taken(tmp_path, warnings):
    state, settings = recorded("generator_a")
    other = {name: x + 1 for name, x in state.items()}
    args = argparse.Namespace(**settings)
    both = {"model": fuller(state), "ema": fuller(other), "args": args}
    torch.save(both, tmp_path / "both.pt")

    def scale(path, **options):
        loaded = df.load_generator(path, **options).params["final_norm"]["scale"]
        return round(float(np.mean(loaded - state["norm.weight"])))

    assert scale(tmp_path / "both.pt") == 1
    assert scale(tmp_path / "both.pt", weights="ema") == 1
    assert scale(tmp_path / "both.pt", weights="model") == 0
    assert warnings == []
    torch.save(both | {"ema": None}, tmp_path / "one.pt")
    assert scale(tmp_path / "one.pt") == 0
    assert "holds no 'ema' weights; reading 'model'" in warnings[0]
    with pytest.raises(ValueError, match="weights='best'; expected 'model', 'ema' or None"):
        df.load_generator(tmp_path / "both.pt", weights="best")

    state, settings = recorded("tokenizer_a")
    other = {name: x + 1 for name, x in state.items()}
    args = argparse.Namespace(**settings)
    torch.save({"model": fuller(state), "ema": fuller(other), "args": args}, tmp_path / "t.pt")
    for options, want in (({}, 0), ({"weights": "ema"}, 1)):
        tokenizer = df.load_tokenizer(tmp_path / "t.pt", **TOKENIZER_HEADS, **options)
        shift = tokenizer.params["codebook"] - state["quantize.embedding.weight"]
        assert round(float(np.mean(shift))) == want


def test_alignment_is_read_where_it_is_asked_for(tokenizer_folder):
    plain = df.load_tokenizer(tokenizer_folder, **TOKENIZER_HEADS)
    asked = df.load_tokenizer(tokenizer_folder, **TOKENIZER_HEADS, teacher_width=48)
    new = set(asked.params) - set(plain.params)
    assert new == {"align_layers_0", "align_layers_1", "align_layers_2"}
    state, _ = recorded("tokenizer_a")
    np.testing.assert_array_equal(
        asked.params["align_layers_2"]["kernel"], state["global_token_proj.4.weight"].T
    )
    with pytest.raises(
        CheckpointError, match=r"global_token_proj\.4\.weight.*expected \(64, 1024\)"
    ):
        df.load_tokenizer(tokenizer_folder, **TOKENIZER_HEADS, teacher_width=64)


# ------------------------------------------------------------------------- what shapes cannot tell


def test_shapes_tell_sizes_without_a_configuration(tmp_path, warnings):
    path = published(tmp_path / "tok", "tokenizer_a", config={})
    bare = df.load_tokenizer(path, **TOKENIZER_HEADS).config
    assert (bare.num_tokens, bare.codebook_size, bare.codebook_dim) == (32, 256, 8)
    assert (bare.group_size, bare.image_size, bare.causal) == (8, 64, 8)
    assert [w.partition("nothing tells ")[2] for w in warnings] == [
        "group_size; 8 taken, as in every published model",
        "image_size; 64 taken, the size that the position table was made for",
    ]
    told = {"group_size": 4, "causal_num": 8, "image_size": 48, "resolution_power": 2.0}
    given = df.load_tokenizer(path, **TOKENIZER_HEADS, **told).config
    assert {name: getattr(given, name) for name in told} == told

    path = published(tmp_path / "gen", "generator_a", config={})
    generator = df.load_generator(path, num_heads=4).config
    assert (generator.width, generator.depth, generator.num_classes) == (64, 2, 10)
    assert (generator.group_size, generator.num_tokens) == (4, 128)
    assert "nothing tells num_tokens; 128 taken" in warnings[-1]
    assert df.load_generator(path, num_heads=4, num_tokens=32).config.num_tokens == 32


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tokenizer_a", {}, r"width 48 and None heads.*encoder_num_heads=\.\.\., a divisor"),
        ("tokenizer_a", {"encoder_num_heads": 4}, r"width 32 and None.*decoder_num_heads=\.\.\."),
        ("tokenizer_a", {"encoder_num_heads": 5}, "width 48 and 5 heads"),
        ("tokenizer_a", {**TOKENIZER_HEADS, "num_tokens": 64}, "num_tokens=64 contradicts.*=32"),
        ("tokenizer_a", {**TOKENIZER_HEADS, "group_size": 5}, "not a multiple of group_size=5"),
        ("tokenizer_a", {**TOKENIZER_HEADS, "group_size": 0}, r"group_size=0; expected int from 1"),
        ("tokenizer_a", {**TOKENIZER_HEADS, "image_size": "64"}, "image_size='64'; expected int"),
        ("tokenizer_a", {**TOKENIZER_HEADS, "num_heads": 4}, "unknown override 'num_heads'"),
        ("generator_a", {}, r"width 64 and None heads.*num_heads=\.\.\., a divisor"),
        ("generator_a", {"num_heads": 7}, "width 64 and 7 heads"),
        ("generator_a", {"num_heads": 4, "width": 32}, "width=32 contradicts.*width=64"),
        ("generator_a", {"num_heads": 4, "heads": 3}, "unknown override 'heads'.*num_heads"),
        ("generator_a", {"num_heads": 4, "num_tokens": 10**9}, "num_tokens=1000000000; expected"),
        ("generator_a", {"num_heads": 4, "causal_num": 6}, "causal_num=6 must be a multiple"),
    ],
)
def test_overrides_that_cannot_be(tmp_path, name, overrides, message):
    path = published(tmp_path / "x", name, config={})
    load = df.load_tokenizer if name.startswith("tokenizer") else df.load_generator
    with pytest.raises(CheckpointError, match=message):
        load(path, **overrides)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer_a", {"codebook_size": 512}, "says codebook_size=512, the weights.*say 256"),
        ("tokenizer_a", {"num_latent_tokens": 64}, "num_latent_tokens=64.*say 32"),
        ("tokenizer_a", {"codebook_embed_dim": "8"}, "codebook_embed_dim='8'.*say 8"),
        ("tokenizer_a", {"enc_patch_size": 16}, "enc_patch_size=16.*say 8"),
        ("tokenizer_a", {"encoder_model": "siglip2_base"}, "'siglip2_base', 12 layers.*say 3"),
        ("tokenizer_a", {"max_image_size": 17}, "image_size=17 is no multiple of the decoder's"),
        ("tokenizer_a", {"causal_encoder": "no"}, "causal_encoder='no'; expected true or false"),
        ("tokenizer_a", {"causal_decoder": True}, "causal_decoder=True"),
        ("tokenizer_a", {"group_size": [4]}, r"group_size=\[4\]; expected int"),
        ("tokenizer_a", {"max_image_size": 10**9}, "image_size=1000000000; expected int from 1"),
        ("generator_a", {"dim": 128}, "says dim=128, the weights.*say 64"),
        ("generator_a", {"n_layer": 3}, "n_layer=3.*say 2"),
        ("generator_a", {"vocab_size": 8192}, "vocab_size=8192.*say 256"),
        ("generator_a", {"num_classes": 11}, "num_classes=11.*say 10"),
        ("generator_a", {"group_size": 8}, "group_size=8.*say 4"),
        ("generator_a", {"n_kv_head": 2}, "n_kv_head=2.*say 4"),
        ("generator_a", {"multiple_of": 100}, "multiple_of=100.*say 256"),
        ("generator_a", {"gpt_model": "GPT-L"}, "gpt_model=GPT-L, 24 layers of width 1024.*2 lay"),
        ("generator_a", {"model_type": "t2i"}, "not conditioned on classes"),
        ("generator_a", {"n_head": True}, "num_heads=True; expected int"),
        ("generator_a", {"n_layer": "x" * 5000}, "says n_layer='x{98}, the weights themselves"),
    ],
)  # fmt: skip
def test_contradictions_name_both_values(tmp_path, name, change, message):
    _, settings = recorded(name)
    path = published(tmp_path / "x", name, config=settings | change)
    tokenizer = name.startswith("tokenizer")
    heads = TOKENIZER_HEADS if tokenizer else {}
    with pytest.raises(CheckpointError, match=message):
        (df.load_tokenizer if tokenizer else df.load_generator)(path, **heads)


def test_a_name_of_sizes_that_is_no_name_is_passed_over(tmp_path):
    _, settings = recorded("tokenizer_a")
    config = settings | {"encoder_model": ["siglip2"]}
    path = published(tmp_path / "x", "tokenizer_a", config=config)
    assert df.load_tokenizer(path, **TOKENIZER_HEADS).config.encoder.depth == 3


def test_override_comes_before_the_configuration(generator_folder):
    assert df.load_generator(generator_folder, num_heads=8).config.num_heads == 8
    assert df.load_generator(generator_folder, num_tokens=64).config.num_tokens == 64


# ------------------------------------------------------------------------------------ wrong weights


def test_the_wrong_door(tokenizer_folder, generator_folder):
    with pytest.raises(CheckpointError, match=r"32\.pt: looks like a DetailFlow generator.*expected"
                       r" a DetailFlow tokenizer.*df\.load_generator"):  # fmt: skip
        df.load_tokenizer(generator_folder)
    with pytest.raises(CheckpointError, match=r"32\.pt: looks like a DetailFlow tokenizer.*expected"
                       r" a DetailFlow generator.*df\.load_tokenizer"):  # fmt: skip
        df.load_generator(tokenizer_folder)
    with pytest.raises(ValueError, match="step=3 is for the workdir of a run"):
        df.load_generator(generator_folder, step=3)


W3 = "layers.1.feed_forward.w3.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({W3: None}, rf"1 of 19 tensors are missing: {W3} \(the file holds 18\)"),
        ({W3: np.zeros((256, 63), np.float32)}, r"w3\.weight' has shape \(256, 63\); expected \(2"),
        ({"layers.0.attention.wqkv.weight": None}, r"wqkv\.weight' is missing"),
        ({"norm.weight": np.zeros((2, 64), np.float32)}, r"norm\.weight' has shape \(2, 64\)"),
        ({"tok_embeddings.weight": np.zeros(64, np.float32)}, "has shape.*expected 2 dimensions"),
        ({"layers.2.extra.weight": np.zeros(3, np.float32)}, "n_layer=2, the weights.*say 3"),
        (
            {"adapter.weight": np.zeros(3, np.float32)},
            r"1 of its tensors belong to no.*adapter\.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        df.load_generator(published(tmp_path / "x", "generator_a", change))


def test_missing_and_unused_can_be_allowed(tmp_path, generator_folder):
    change = {W3: None, "adapter.weight": np.zeros(3, np.float32)}
    path = published(tmp_path / "x", "generator_a", change)
    with pytest.raises(CheckpointError, match="are missing"):
        df.load_generator(path, allow_unused=True)
    with pytest.raises(CheckpointError, match="belong to no parameter"):
        df.load_generator(path, allow_missing=True)
    got = df.load_generator(path, allow_missing=True, allow_unused=True).params["blocks"]
    whole = df.load_generator(generator_folder).params["blocks"]
    new = np.asarray(got["layers_1"]["w3"]["kernel"])
    assert 0.015 < new.std() < 0.025  # as the network starts
    for part in ("w1", "w2"):
        kernel = whole["layers_1"][part]["kernel"]
        np.testing.assert_array_equal(got["layers_1"][part]["kernel"], kernel)
    np.testing.assert_array_equal(
        got["layers_0"]["w3"]["kernel"], whole["layers_0"]["w3"]["kernel"]
    )


def test_nan_is_warned(tmp_path, warnings):
    state, _ = recorded("generator_a")
    state["output.weight"][3, 4] = np.nan
    generator = df.load_generator(published(tmp_path / "x", "generator_a", state))
    assert f"{generator.source}: 1 of 19 tensors hold NaN or infinite numbers: output.weight" in (
        warnings
    )


def test_pair_that_does_not_belong_together(tmp_path, tokenizer_folder, generator_folder):
    tokenizer = df.load_tokenizer(tokenizer_folder, **TOKENIZER_HEADS)
    generator = df.load_generator(generator_folder)
    df.check_pair(tokenizer, generator)
    state, settings = recorded("generator_a")
    small = {k: state[k][:128] for k in ("tok_embeddings.weight", "output.weight")}
    path = published(tmp_path / "x", "generator_a", small, settings | {"vocab_size": 128})
    with pytest.raises(
        ValueError, match="codebook_size is 128 in the generator and 256 in the tok"
    ):
        df.check_pair(tokenizer, df.load_generator(path))
    for field, value in (("num_tokens", 64), ("causal_num", 8)):
        other = df.load_generator(generator_folder, **{field: value})
        with pytest.raises(ValueError, match="do not belong together"):
            df.check_pair(tokenizer, other)
    other = df.load_tokenizer(tokenizer_folder, **TOKENIZER_HEADS, group_size=8)
    with pytest.raises(ValueError, match="group_size is 4 in the generator and 8 in the tokenizer"):
        df.check_pair(other, generator)


# ------------------------------------------------------------------------------------------ fuzzing


def test_random_corruptions_of_a_whole_checkpoint(tmp_path, monkeypatch):
    """1,000 damaged copies through the door end in a network or in one clear error."""
    state, settings = recorded("generator_a")
    rng, numpy_rng = random.Random(0), np.random.default_rng(0)
    rows = {"tok_embeddings.weight": 8, "output.weight": 8}
    narrow = {}
    for name, x in state.items():  # the same network, smaller, so that names weigh more
        shape = [max(n // 8, 3) for n in x.shape]
        shape[0] = rows.get(name, x.shape[0] if "special" in name or "cls" in name else shape[0])
        narrow[name] = torch.from_numpy(numpy_rng.standard_normal(shape).astype(np.float32))
    for i in range(settings["n_layer"]):
        for name in ("w1", "w3", "w2"):
            shape = (8, 32) if name == "w2" else (32, 8)
            narrow[f"layers.{i}.feed_forward.{name}.weight"] = torch.zeros(shape)
    settings |= {"dim": 8, "n_head": 2, "vocab_size": 8}
    torch.save({"model": narrow, "args": argparse.Namespace(**settings)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    published_lib.read("generator", tmp_path / "x.pt")

    abstract = {}  # tracing takes most of the time, and depends on the configuration alone
    trace = registry.Network.abstract
    monkeypatch.setattr(
        registry.Network, "abstract",
        lambda self, config, scan: abstract.get(config)
        or abstract.setdefault(config, trace(self, config, scan=scan)),
    )  # fmt: skip
    outcomes, slowest = {True: 0, False: 0}, 0.0
    for _ in range(1000):
        (tmp_path / "x.pt").write_bytes(corrupt(whole, rng))
        started = time.monotonic()
        try:
            loaded = published_lib.read("generator", tmp_path / "x.pt")
            assert loaded.config.width == 8
            outcomes[True] += 1
        except CheckpointError as error:
            assert str(tmp_path / "x.pt") in str(error)
            outcomes[False] += 1
        slowest = max(slowest, time.monotonic() - started)
    assert min(outcomes.values()) > 50, outcomes
    assert slowest < 10
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_corrupted_configuration(tmp_path, generator_folder):
    folder = tmp_path / "gen"
    shutil.copytree(generator_folder, folder)
    (folder / "config.yaml").unlink()
    text, rng = (folder / "config.json").read_bytes(), random.Random(1)
    refused = 0
    for _ in range(60):
        (folder / "config.json").write_bytes(corrupt(text, rng))
        try:
            df.load_generator(folder)
        except CheckpointError as error:
            refused += str(folder) in str(error)
    assert refused > 20
