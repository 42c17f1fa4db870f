"""Published checkpoints of every form are read bit-exact, without PyTorch."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from detailflow_jax.convert import CheckpointError, read_checkpoint, torch_file


def a_state(seed=0):
    """Tensors of every kind that a state dict may hold."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 8, generator=generator)
    return OrderedDict(
        {
            "float32": base.clone(),
            "float64": base.double(),
            "float16": base.half(),
            "bfloat16": base.bfloat16(),
            "int64": torch.arange(7) - 3,
            "int32": torch.arange(7, dtype=torch.int32),
            "uint8": torch.arange(7, dtype=torch.uint8),
            "bool": base > 0,
            "scalar": torch.tensor(3.5),
            "scalar_int": torch.tensor(2**40),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(base + 1),
        }
    )


def with_views(state):
    """Adds what only `.pt` can hold: strided tensors and ones that share a storage."""
    base = torch.arange(48.0).reshape(6, 8)
    views = {"base": base, "rows": base[2:4], "transposed": base.T, "column": base[:, 3]}
    return OrderedDict(state, **views)


def digest(dtype, shape, data):
    return [str(dtype).removeprefix("torch."), list(shape), hashlib.sha256(data).hexdigest()]


def torch_digests(state):
    return {
        name: digest(x.dtype, x.shape, x.detach().contiguous().flatten().view(torch.uint8).numpy())
        if x.numel()
        else digest(x.dtype, x.shape, b"")
        for name, x in state.items()
    }


def digests(tensors):
    return {name: digest(x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}


def run_python(code, *args, **env):
    """Runs `code` in a fresh interpreter and returns what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ_WITHOUT_TORCH = """
import hashlib, json, sys
from detailflow_jax.convert import read_checkpoint
out = {}
for path in sys.argv[1:]:
    tensors = read_checkpoint(path).tensors
    out[path] = {n: [str(x.dtype), list(x.shape), hashlib.sha256(x.tobytes()).hexdigest()]
                 for n, x in tensors.items()}
assert "torch" not in sys.modules and "jax" not in sys.modules
print(json.dumps(out))
"""


def test_every_form_is_bit_exact_without_torch(tmp_path):
    state, views = a_state(), with_views(a_state())
    expected = {}
    for name, options in {
        "zip2.pt": {}, "zip5.pth": {"pickle_protocol": 5},
        "old.ckpt": {"_use_new_zipfile_serialization": False},
    }.items():  # fmt: skip
        torch.save({"model": views}, tmp_path / name, **options)
        expected[str(tmp_path / name)] = torch_digests(views)
    torch.save(views, tmp_path / "bare.bin")
    expected[str(tmp_path / "bare.bin")] = torch_digests(views)
    safetensors.torch.save_file(state, tmp_path / "one.safetensors")
    expected[str(tmp_path / "one.safetensors")] = torch_digests(state)
    assert run_python(READ_WITHOUT_TORCH, *expected) == expected


def test_types_only_newer_pickles_hold(tmp_path):
    state = {
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "f8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    }
    torch.save(state, tmp_path / "x.pt")
    tensors = read_checkpoint(tmp_path / "x.pt").tensors
    np.testing.assert_array_equal(tensors["u16"], np.array([1, 65535], np.uint16))
    assert tensors["f8"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(tensors["f8"].astype(np.float32), [1.5, -2.0])


def test_tensors_are_views_of_the_file(tmp_path):
    torch.save({"w": torch.zeros(64, 64)}, tmp_path / "x.pt")
    safetensors.torch.save_file({"w": torch.zeros(64, 64)}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        array = read_checkpoint(tmp_path / name).tensors["w"]
        assert not array.flags.owndata and not array.flags.writeable


def test_what_lies_beside_the_weights(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(gpt_model="GPT-L", betas=(0.9, 0.95), causal_num=None, lr=1e-4)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "best": np.float64(3.5), "rng": np.arange(3), "device": torch.device("cpu"),
        "steps": 7, "args": args,
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")
    assert digests(read.tensors) == torch_digests(model.state_dict())
    assert read.config == {
        "gpt_model": "GPT-L", "betas": [0.9, 0.95], "causal_num": None, "lr": 1e-4,
    }  # fmt: skip
    assert read.notices == [] and read.source == str(tmp_path / "x.pt")


def test_optimizer_state_is_not_looked_at(tmp_path, monkeypatch):
    from detailflow_jax.convert import readers

    seen = []
    original = readers.read_tensors
    monkeypatch.setattr(
        readers, "read_tensors", lambda *args: seen.extend(args[2]) or original(*args)
    )
    content = {"model": {"a": torch.ones(2)}, "ema": {"b": torch.ones(2)}, "optimizer": [{}]}
    torch.save({**content, "discriminator": {"c": torch.ones(2)}}, tmp_path / "x.pt")
    read_checkpoint(tmp_path / "x.pt", "ema")
    assert seen == ["b"]


def fake_class(monkeypatch, dotted, base):
    """A class that pickles under `dotted`, which no reader can import."""
    module, _, name = dotted.rpartition(".")
    for i in range(1, module.count(".") + 2):
        part = ".".join(module.split(".")[:i])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    made = type(name, (base,), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made


def like_ruamel(monkeypatch):
    """ScalarFloat, ScalarInt and Anchor as the published training scripts pickle them."""
    anchor = fake_class(monkeypatch, "ruamel.yaml.anchor.Anchor", object)()
    anchor.value, anchor.always_dump = None, False
    kinds = {float: "scalarfloat.ScalarFloat", int: "scalarint.ScalarInt"}
    classes = {k: fake_class(monkeypatch, f"ruamel.yaml.{n}", k) for k, n in kinds.items()}

    def number(value):
        made = classes[type(value)](value)
        # As ruamel sets them: the anchor is an attribute of the number.
        made.__dict__.update(_width=5, _prec=1, _m_sign=False, _yaml_anchor=anchor)
        return made

    return number


@pytest.mark.parametrize("protocol", [2, 5])
def test_what_the_published_training_scripts_write(tmp_path, monkeypatch, protocol):
    number = like_ruamel(monkeypatch)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=number(1e-4), eps=number(1e-8))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Half(number(0.5)))
    args = argparse.Namespace(
        degradation_power=number(2.0), num_latent_tokens=number(128), group_size=number(8),
        betas=[number(0.9), number(0.95)], vq_model="VQ-16", huge=10**400,
        enc_pretrained=True, seeds=torch.Size([1, 2]),
    )  # fmt: skip
    content = {
        "model": model.state_dict(), "ema": model.state_dict(),
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "discriminator": {"w": torch.ones(2)}, "steps": number(7), "args": args,
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    for name in [n for n in sys.modules if n.startswith("ruamel")]:
        monkeypatch.delitem(sys.modules, name)
    read = read_checkpoint(tmp_path / "x.pt")
    assert digests(read.tensors) == torch_digests(model.state_dict())
    assert read.config == {
        "degradation_power": 2.0, "num_latent_tokens": 128, "group_size": 8,
        "betas": [0.9, 0.95], "vq_model": "VQ-16", "enc_pretrained": True, "seeds": [1, 2],
    }  # fmt: skip
    assert {type(read.config[name]) for name in ("degradation_power", "group_size")} == {float, int}
    assert read.notices == []


class Half:
    """A schedule with state, which LambdaLR pickles."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, step):
        return self.factor


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Metrics:
    best: float = 1.0


def beside_weights(monkeypatch):
    """Objects that trainers leave in checkpoints."""
    path = fake_class(monkeypatch, "pathlib._local.PosixPath", object)()
    shared = collections.deque([1, 2], maxlen=5)
    return {
        "a class as a key": {Metrics: {"monitor": "loss"}, "type": Metrics},
        "path": [path, Path("/tmp/x")],
        "time": [datetime.datetime(2025, 1, 2), datetime.timedelta(3), datetime.UTC],
        "deque": [shared, shared],
        "namespace": types.SimpleNamespace(lr=1.0, inner=argparse.Namespace(a=[1])),
        "keys": {(1, 2): 3, (1, (2, 3)): 4, 1.5: 2, None: 1, True: 0, b"x": 1, 2**80: 1},
        "sets": [{1, (2, 3)}, frozenset({"a", 4})],
        "enum": [Colour.RED, {Colour.RED: Colour}],
        "numpy": [np.float64(3.5), np.arange(3), np.dtype("f4"), np.array(["a"], object)],
        "partial": functools.partial(max, 3, key=abs),
        "functions": [len, torch.nn.functional.relu, print],
        "dicts": [
            collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]),
            collections.Counter("aab"),
        ],
        "torch": [
            torch.Size([1]), torch.float32, torch.device("cpu"), torch.strided,
            torch.nn.Linear(2, 2), torch.Generator().get_state(), torch.eye(2).to_sparse(),
        ],
        "random": [random.getstate(), np.random.get_state(), np.random.PCG64(3).state],
        "complex": [1j, 10**30, "\ud800", bytearray(b"x"), slice(1, 2), range(3), ...],
        "error": ValueError("x"),
        "metrics": Metrics(),
        "named": torch.return_types.max((torch.ones(1), torch.ones(1))),
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_object_beside_the_weights_matters(tmp_path, monkeypatch, protocol, zipped):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    everything = beside_weights(monkeypatch)
    for name, value in [*everything.items(), ("all", everything)]:
        content = {"callbacks": value, "state_dict": {"w": torch.arange(3.0)}, "args": value}
        torch.save(content, tmp_path / "x.pt", **options)
        read = read_checkpoint(tmp_path / "x.pt")
        assert read.tensors["w"].tolist() == [0, 1, 2], name


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_as_numpy_arrays(tmp_path, monkeypatch, protocol, zipped):
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1 << 15)  # Numbers do not count.
    rng = np.random.default_rng(0)
    large = rng.standard_normal((200, 300))
    state = {
        "a.weight": large.astype(np.float32),
        "a.again": large.astype(np.float16),
        "a.bias": large[0].astype(">f4"),
        "b.weight": np.asfortranarray(large[:5]),
        "b.brain": large[:2].astype(ml_dtypes.bfloat16),
        "b.mask": large[0] > 0,
        "b.counter": np.array(7),
        "b.none": np.zeros((0, 3), np.int32),
    }
    state["a.tied"] = state["a.weight"]
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"model": state, "args": {"lr": np.float32(0.5)}}, tmp_path / "x.pt", **options)
    read = read_checkpoint(tmp_path / "x.pt")
    assert read.config == {"lr": 0.5}
    assert set(read.tensors) == set(state)
    for name, want in state.items():
        found = read.tensors[name]
        np.testing.assert_array_equal(found, want.astype(want.dtype.newbyteorder("=")))
        assert found.shape == want.shape and found.dtype.isnative, name
    # Among tensors, as something beside the weights, they are left out with a notice.
    tensors = {"w": torch.ones(2), "generator": np.arange(3)}
    torch.save({"model": tensors}, tmp_path / "y.pt", **options)
    read = read_checkpoint(tmp_path / "y.pt")
    assert list(read.tensors) == ["w"] and "NumPy arrays among tensors" in read.notices[0]
    strange = {"w": np.array(["a", None], object), "v": np.zeros(2, "f4,i4"), "u": np.array("a")}
    torch.save(strange, tmp_path / "z.pt", **options)
    with pytest.raises(CheckpointError, match="no weights in it"):
        read_checkpoint(tmp_path / "z.pt")


def test_expanded_tensors_and_packed_folders(tmp_path):
    torch.save({"w": torch.arange(3.0)[:, None].expand(3, 10_000)}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").tensors["w"].sum() == 30_000
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:  # as packing by hand leaves it
        archive.mkdir("x/data")
    assert read_checkpoint(tmp_path / "x.pt").tensors["w"].shape == (3, 10_000)


def test_parameters_with_attributes_are_tensors(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tag = {"a": 1}
    torch.save({"w": parameter, "b": torch.zeros(2)}, tmp_path / "x.pt")
    tensors = read_checkpoint(tmp_path / "x.pt").tensors
    assert tensors["w"].tolist() == [1, 1]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_that_was_saved_whole(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert digests(read_checkpoint(tmp_path / "x.pt").tensors) == torch_digests(model.state_dict())


def test_tensors_of_another_kind_are_named(tmp_path):
    content = {"w": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "names": {(1, 2): 3}}
    torch.save(content, tmp_path / "x.pt")
    (notice,) = read_checkpoint(tmp_path / "x.pt").notices
    assert notice.endswith("2 entries are no tensors: sparse, names")
    newer = torch.ones(2).to(torch.float8_e5m2).view(torch.uint8).view(torch.float8_e4m3fnuz)
    torch.save({"w": torch.ones(2), "newer": newer}, tmp_path / "x.pt")
    (notice,) = read_checkpoint(tmp_path / "x.pt").notices
    assert notice.endswith("1 entries are no tensors: newer")
    torch.save({"w": torch.tensor([1j]).conj()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'w': it is stored negated or conjugated"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("layers._orig_mod.0.w", "layers.0.w"),
        ("module._orig_mod.module.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.w",
         "layers.3.w"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("enc.module.w", "enc.module.w"),
    ],
)  # fmt: skip
def test_wrappers_inside_names_are_removed(tmp_path, name, bare):
    torch.save({"model": {name: torch.ones(2)}}, tmp_path / "x.pt")
    assert list(read_checkpoint(tmp_path / "x.pt").tensors) == [bare]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_are_stripped(tmp_path, prefix):
    torch.save({"model": {f"{prefix}enc.module.w": torch.ones(2)}}, tmp_path / "x.pt")
    assert list(read_checkpoint(tmp_path / "x.pt").tensors) == ["enc.module.w"]


def test_a_name_with_and_without_prefix_is_refused(tmp_path):
    torch.save({"w": torch.ones(2), "module.w": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'w' is there twice"):
        read_checkpoint(tmp_path / "x.pt")
