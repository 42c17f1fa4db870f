"""Weights are found wherever people's training scripts put them; what lies beside them is inert."""

import argparse
import collections
import dataclasses
import datetime
import json
import pathlib

import ml_collections
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

import detailflow_jax as df
from convert_models import TOKENIZER_HEADS, recorded
from detailflow_jax.convert import CheckpointError, unnamed
from detailflow_jax.convert.load import load

HEADS = "tokenizer", TOKENIZER_HEADS


def tensors(name="generator_a", shift=0.0):
    """({published name: tensor}, configuration) of a small recorded network."""
    state, settings = recorded(name)
    return {k: torch.from_numpy(np.array(x + shift)) for k, x in state.items()}, settings


def prefixed(prefix, state):
    return {f"{prefix}{name}": x for name, x in state.items()}


def nested(state):
    """Dicts in dicts instead of dotted names."""
    tree = {}
    for name, x in state.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = x
    return tree


class Shadow:
    """An average as an object that is saved whole."""

    def __init__(self, state):
        self.decay, self.shadow = 0.999, state


class Holder(torch.nn.Module):
    """A module with the parameters of a state dict, saved whole."""

    def __init__(self, state):
        super().__init__()
        for name, x in nested(state).items():
            if isinstance(x, dict):
                self.add_module(name, Holder(dict(flat(x))))
            else:
                self.register_parameter(name, torch.nn.Parameter(x))


def flat(tree, prefix=""):
    for name, x in tree.items():
        if isinstance(x, dict):
            yield from flat(x, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", x


class OnDevice:
    """A tensor as it is saved from a TPU or the like."""

    def __init__(self, x, how):
        self.function, self.x = getattr(torch._utils, f"_rebuild_{how}"), x

    def __reduce__(self):
        return self.function, (self.x, torch.float32, "xla:0", False)


class Sharded:
    """A DTensor as it is saved: the part of one process, and the shape of the whole."""

    def __init__(self, part, shape):
        self.part, self.shape = part, shape

    def __reduce__(self):
        whole = Sharded, torch.float32, self.shape, self.part.stride(), 0
        kind = torch._utils._rebuild_wrapper_subclass
        args = kind, Sharded, whole, {"_local_tensor": self.part}
        return torch._tensor._rebuild_from_type_v2, args


@dataclasses.dataclass
class Arguments:
    """Settings as a dataclass."""

    dim: int
    n_head: int
    block_size: int
    out: pathlib.Path = pathlib.Path("runs")


def shift_of(path, **options):
    """By how much the loaded weights differ from the recorded ones."""
    state, settings = recorded("generator_a")
    told = {"num_heads": settings["n_head"], "num_tokens": settings["block_size"]}
    params = df.load_generator(path, **told | options).params
    return round(float(np.mean(params["final_norm"]["scale"] - state["norm.weight"])))


MODEL, AVERAGE = tensors()[0], tensors(shift=1.0)[0]
LITEMA = {name.replace(".", ""): x for name, x in AVERAGE.items()}
FORMS = {
    "published": {"model": MODEL, "ema": AVERAGE, "optimizer": {"state": {0: {"step": 1}}}},
    "lightning": {
        "state_dict": prefixed("model.", MODEL) | prefixed("ema_model.", AVERAGE),
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(1.0)}}, "epoch": 3,
    },
    "callback": {
        "state_dict": prefixed("net.", MODEL), "callbacks": {"EMA": {"ema_state_dict": AVERAGE}},
    },
    "wrapped twice": {"state_dict": {"model": MODEL, "ema": {"shadow": AVERAGE, "decay": 0.9}}},
    "ema class": {
        "model": MODEL,
        "ema": prefixed("online_model.", MODEL) | prefixed("ema_model.", AVERAGE)
        | {"initted": torch.tensor(True), "step": torch.tensor(7)},
    },
    "swa": {
        "model_state_dict": MODEL,
        "swa_model": prefixed("module.", AVERAGE) | {"n_averaged": torch.tensor(3)},
    },
    "shadow": {"net": MODEL, "ema_shadow": AVERAGE, "scaler": {"scale": 65536.0}},
    "object": {"model": MODEL, "ema": Shadow(AVERAGE)},
    "modules": {"model": Holder(MODEL), "model_ema": Holder(AVERAGE)},
    "bare with average": MODEL | prefixed("model_ema.", AVERAGE),
    "no dots": {
        "state_dict": prefixed("model.", MODEL) | prefixed("model_ema.", LITEMA)
        | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)},
    },
    "no dots, no key": MODEL | prefixed("model_ema.", LITEMA)
    | {"model_ema.decay": torch.tensor(0.9), "epoch": torch.tensor(3)},
    "underscores": {
        "model": MODEL, "ema": {"shadow": {k.replace(".", "_"): x for k, x in AVERAGE.items()}},
    },
    "list of parameters": {
        "model": MODEL, "ema": {"decay": 0.9, "shadow_params": list(AVERAGE.values())},
    },
    "list beside buffers": {
        "model": MODEL | {"freqs_cis": torch.ones(3, 2), "steps": torch.tensor(3)},
        "ema": {
            "shadow_params": list(AVERAGE.values()), "collected_params": list(MODEL.values()),
        },
    },
    "list of a module": {"model": Holder(MODEL), "ema": list(Holder(AVERAGE).parameters())},
    "lists of several decays": {
        "ema_rate": [0.99, 0.999], "model": MODEL,
        "ema_params": [list(AVERAGE.values()), list(MODEL.values())],
    },
    "decays as keys": {"model": MODEL, "ema": {0.99: AVERAGE, 0.999: MODEL}},
    "lists by decay": {"model": MODEL, "ema": {0.99: list(AVERAGE.values())}},
    "numbered": {
        "model": MODEL, "ema": {"shadow": dict(enumerate(AVERAGE.values()))},
        "optimizer": {"state": {i: {"exp_avg": x} for i, x in enumerate(AVERAGE.values())}},
    },
    "numbered backwards": {
        "model": MODEL, "ema": dict(reversed([*enumerate(AVERAGE.values())])),
    },
    "by address": {"model": MODEL, "ema": {id(x): x for x in AVERAGE.values()}},
    "pairs": {"model": list(MODEL.items()), "ema": [[k, x] for k, x in AVERAGE.items()]},
    "whole numbers as keys": {"model": MODEL, "ema": {10: AVERAGE, 100: MODEL}},
    "arrays": {
        "model": MODEL, "history": [torch.tensor(2.0)],
        "avg": [(0.9, [x.numpy() for x in AVERAGE.values()])],
    },
    "list": [{"model": MODEL, "ema": AVERAGE}, 7],
    "pair": (MODEL, {"ema": AVERAGE}),
    "nested": {"model": nested(MODEL), "ema": nested(AVERAGE)},
    "wrappers": {
        "model": prefixed("_orig_mod.module.", MODEL),
        "ema": {
            name.replace("layers.", "layers._orig_mod.").replace(
                "attention.", "_fsdp_wrapped_module._checkpoint_wrapped_module.attention.module."
            ): x
            for name, x in AVERAGE.items()
        },
    },
    "other wrappers": {
        "model": {
            name.replace("attention.", "_fpw_module.attention.base_layer.").replace(
                "layers.", "layers._orig_module."
            ): x
            for name, x in MODEL.items()
        },
        "_ema_module": prefixed("_wrapped_module.", AVERAGE),
    },
    "of a TPU": {
        "model": {k: OnDevice(x, "device_tensor_from_cpu_tensor") for k, x in MODEL.items()},
        "ema": {k: OnDevice(x.numpy(), "device_tensor_from_numpy") for k, x in AVERAGE.items()},
    },
    "of one process": {
        "model": {k: Sharded(x, x.shape) for k, x in MODEL.items()}, "ema": AVERAGE,
    },
    "defaultdict": {
        "model": collections.defaultdict(list, MODEL),
        "ema": collections.OrderedDict(AVERAGE),
    },
    "discriminator": {
        "model": MODEL, "ema": AVERAGE,
        "discriminator": {"heads.0.0.0.weight_orig": torch.ones(3)},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_both_sets(tmp_path, form):
    torch.save(FORMS[form], tmp_path / "x.pt")
    assert shift_of(tmp_path / "x.pt", weights="model") == 0
    assert shift_of(tmp_path / "x.pt", weights="ema") == 1
    assert shift_of(tmp_path / "x.pt") == 1  # what the published evaluation takes
    found = load("generator", tmp_path / "x.pt", weights="model", overrides={"num_heads": 4})
    assert found.taken == "model" and not found.report.unused


@pytest.mark.parametrize(
    ("key", "shift"),
    [
        *dict.fromkeys(("modelEma", "emas", "polyak", "avg_model", "MovingAverage"), 1).items(),
        *dict.fromkeys(("exp_avg", "online_copy"), 0).items(),
    ],
)
def test_which_keys_hold_an_average(tmp_path, key, shift):
    torch.save({"model": MODEL, key: AVERAGE}, tmp_path / "x.pt")
    assert shift_of(tmp_path / "x.pt") == shift


def test_of_averages_of_several_decays_the_first_is_taken(tmp_path):
    torch.save(FORMS["lists of several decays"], tmp_path / "x.pt")
    found = load("generator", tmp_path / "x.pt", overrides={"num_heads": 4, "num_tokens": 32})
    assert any("under 'ema_params.0', not 'ema_params.1'" in n for n in found.notices)


def test_an_average_without_names_that_does_not_fit_is_refused(tmp_path):
    rows = list(AVERAGE.values())
    swapped = [rows[1], rows[0], *rows[2:]]
    for values, why in (
        (rows[:-1], rf"'ema.shadow_params' is a list: it has {len(rows) - 1}, the model"),
        (swapped, r"its tensor 0 is \(\d+, \d+\), where cls_embedding.* is \(\d+, \d+\); expected"),
    ):
        torch.save({"model": MODEL, "ema": {"shadow_params": values}}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=why):
            df.load_generator(tmp_path / "x.pt", num_heads=4, num_tokens=32)
        assert shift_of(tmp_path / "x.pt", weights="model") == 0
    torch.save({"model": MODEL, "ema_losses": [torch.ones(1)] * 3}, tmp_path / "x.pt")
    assert shift_of(tmp_path / "x.pt") == 0  # no parameters at all


@pytest.mark.parametrize("key", ["shadow_params", None])
def test_a_list_without_a_model_says_what_is_missing(tmp_path, key):
    values = list(AVERAGE.values())
    torch.save({"decay": 0.9, key: values} if key else values, tmp_path / "x.pt")
    found = rf"{len(values)} tensors in a list, without names .*state dict beside.*copy_to"
    with pytest.raises(CheckpointError, match=found):
        df.load_generator(tmp_path / "x.pt", num_heads=4, num_tokens=32)


def test_frozen_parts_and_tables_are_no_parameters():
    model = {"repa_model.a": np.ones(3), "b.running_mean": np.ones(3), "c": np.ones((2, 1))}
    row, column = np.ones(3), np.ones((2, 1))
    assert unnamed.names_of([row, column], model) == ["repa_model.a", "c"]
    assert unnamed.names_of([row, row, column], model) == [*model]
    assert unnamed.names_of([column], model) == ["c"]
    assert unnamed.names_of([row], model) is None


def test_an_average_that_is_not_known_is_told(tmp_path):
    few = dict.fromkeys(("a", "b"), torch.ones(1))
    torch.save({"model": MODEL, "ema": {"shadow": few}}, tmp_path / "x.pt")
    found = load("generator", tmp_path / "x.pt", overrides={"num_heads": 4, "num_tokens": 32})
    assert "(those under 'ema.shadow' are of no network known); reading 'm" in found.notices[0]


@pytest.mark.parametrize("prefix", ["model.", "module.ema_model.", "state_dict.net."])
def test_safetensors_and_their_shards(tmp_path, prefix):
    state = prefixed(prefix, MODEL)
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    assert shift_of(tmp_path / "x.safetensors") == 0
    index = {}
    for i in (1, 2):
        file = f"model-0000{i}-of-00002.safetensors"
        half = dict(list(state.items())[i - 1 :: 2])
        safetensors.torch.save_file(half, tmp_path / file)
        index |= dict.fromkeys(half, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "x.safetensors").unlink()
    assert shift_of(tmp_path) == 0


def test_types_and_tied_storages(tmp_path):
    state = {name: x.bfloat16() for name, x in MODEL.items()}
    whole = torch.cat([x.flatten() for x in state.values()])
    at = 0
    for name, x in state.items():  # all of them views of one storage
        state[name] = whole[at : at + x.numel()].view(x.shape)
        at += x.numel()
    torch.save({"model": state, "ema": state}, tmp_path / "x.pt")
    want = {k: x.astype(ml_dtypes.bfloat16) for k, x in recorded("generator_a")[0].items()}
    params = df.load_generator(tmp_path / "x.pt", num_heads=4, num_tokens=32).params
    np.testing.assert_array_equal(
        params["token_embedding"]["embedding"],
        want["tok_embeddings.weight"].astype(np.float32),
    )


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["dataclass", "namespace", "dict", "numpy", "ConfigDict"])
@pytest.mark.parametrize("key", ["args", "hyper_parameters", "config", "cfg"])
def test_settings_of_any_type(tmp_path, key, kind, protocol):
    plain = {"dim": 64, "n_head": 4, "block_size": 32, "out": pathlib.Path("x")}
    args = {
        "dataclass": lambda: Arguments(**plain),
        "namespace": lambda: argparse.Namespace(**plain, when=datetime.datetime(2025, 1, 2)),
        "dict": lambda: plain,
        "ConfigDict": lambda: ml_collections.ConfigDict(plain),
        "numpy": lambda: {
            "dim": np.int64(64), "n_head": np.int32(4), "block_size": np.int16(32),
            "lr": np.float32(0.5), "rng": np.random.get_state(),
        },
    }[kind]()  # fmt: skip
    torch.save({"model": MODEL, key: args}, tmp_path / "x.pt", pickle_protocol=protocol)
    config = df.load_generator(tmp_path / "x.pt").config
    assert (config.num_heads, config.num_tokens) == (4, 32)


def test_a_large_history_beside_the_weights(tmp_path):
    losses = [float(i) for i in range(1_200_000)]  # over 10 MB of pickle
    torch.save({"model": MODEL, "losses": losses}, tmp_path / "x.pt")
    assert shift_of(tmp_path / "x.pt") == 0


def test_a_part_of_a_larger_checkpoint(tmp_path):
    state = prefixed("first_stage_model.", tensors("tokenizer_a")[0])
    state |= prefixed("model.diffusion_model.", {"w": torch.ones(3)})
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    got = df.load_tokenizer(tmp_path / "x.ckpt", **TOKENIZER_HEADS, group_size=4)
    want = recorded("tokenizer_a")[0]["quantize.embedding.weight"]
    np.testing.assert_array_equal(got.params["codebook"], want)


def test_the_network_wanted_is_taken_of_several(tmp_path):
    tokenizer = tensors("tokenizer_a")[0]
    torch.save({"vq": tokenizer, "gpt": MODEL}, tmp_path / "x.pt")
    assert shift_of(tmp_path / "x.pt") == 0
    assert df.load_tokenizer(tmp_path / "x.pt", **TOKENIZER_HEADS).config.num_tokens == 32
    with pytest.raises(
        CheckpointError, match=r"looks like a DetailFlow tokenizer.*latent autoencoder"
    ):
        df.load_vae(tmp_path / "x.pt")


def test_two_of_the_same_kind_are_named(tmp_path):
    torch.save({"old": AVERAGE, "model": MODEL}, tmp_path / "x.pt")
    found = load("generator", tmp_path / "x.pt", overrides={"num_heads": 4, "num_tokens": 32})
    assert any("reading the weights under 'model', not 'old'" in n for n in found.notices)


def test_a_part_of_a_sharded_tensor_is_no_tensor(tmp_path):
    state = {k: Sharded(x, (2 * len(x), *x.shape[1:])) for k, x in MODEL.items()}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no weights in it"):
        df.load_generator(tmp_path / "x.pt", num_heads=4)


@pytest.mark.parametrize(
    "settings", [{"config": {"args": {}}}, {"hyper_parameters": {"model": {}}}]
)
def test_settings_in_sections(tmp_path, settings):
    ((section,),) = (inner.values() for inner in settings.values())
    section.update(n_head=4, block_size=32)
    torch.save({"model": MODEL, **settings}, tmp_path / "x.pt")
    assert df.load_generator(tmp_path / "x.pt").config.num_heads == 4


def test_an_error_says_what_the_weights_are(tmp_path):
    name = "layers.0.attention.wo.weight"
    half = {k: x for k, x in AVERAGE.items() if k != name}
    meta = MODEL | {name: MODEL[name].to("meta")}
    whole = {k: (x * 50).to(torch.int8) for k, x in MODEL.items()}
    for content, message in (
        ({"model": MODEL, "ema": half}, "'ema' weights; weights='model' reads the others"),
        ({"model": meta}, f"1 entries are no tensors: {name}"),
        ({"model": whole}, r"is int8; expected real numbers, in floating point\. If"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=message):
            df.load_generator(tmp_path / "x.pt", num_heads=4, num_tokens=32)
