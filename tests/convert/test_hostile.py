"""Hostile and broken files: nothing in them runs, and each ends in one clear error."""

import builtins
import errno
import io
import os
import pickle
import random
import struct
import subprocess
import tempfile
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

from damage import corrupt
from detailflow_jax.convert import CheckpointError, read_checkpoint, torch_file


class Calls:
    """Pickles as a call of `function` on `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class FakeStorage:
    def __init__(self, key, kind, numel):
        self.pid = ("storage", kind, key, "cpu", numel)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, FakeStorage) else None


def pickled(tree, protocol=2):
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(tree)
    return stream.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def write_pt(path, tree, storages=(("0", bytes(24)),), **more):
    """An archive as torch.save writes it, around any pickle."""
    data = tree if isinstance(tree, bytes) else pickled(tree)
    members = {"x/data.pkl": data, "x/byteorder": b"little", "x/version": b"3\n", **more}
    members |= {f"x/data/{key}": storage for key, storage in storages}
    return write_zip(path, members.items())


def tensor(offset, shape, strides, kind=torch.FloatStorage, numel=6, key="0"):
    arguments = (FakeStorage(key, kind, numel), offset, shape, strides, False, OrderedDict())
    return Calls(torch._utils._rebuild_tensor_v2, *arguments)


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_the_helpers_write_what_is_read(tmp_path):
    numbers = np.arange(6, dtype="<f4")
    path = write_pt(tmp_path / "x.pt", {"w": tensor(1, (2, 2), (3, 1))}, [("0", numbers.tobytes())])
    np.testing.assert_array_equal(read_checkpoint(path).tensors["w"], [[1, 2], [4, 5]])


class Built:
    """Pickles with attributes that `BUILD` would set."""

    def __init__(self, state):
        self.__dict__.update(state)


def commands(canary):
    touch = f"touch {canary}"
    by_name = Calls(getattr, Calls(__import__, "os"), "system")
    return {
        f"{os.system.__module__}.system": Calls(os.system, touch),
        "eval": Calls(eval, f"__import__('os').system({touch!r})"),
        "exec": Calls(builtins.exec, f"open({str(canary)!r}, 'w')"),
        "getattr": by_name,
        ".Popen": Calls(subprocess.Popen, ["touch", str(canary)]),
        "torch.hub.load": Calls(torch.hub.load, "owner/repository", "model"),
        ".load": Calls(torch.load, str(canary)),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "Built": Built({"__setstate__": 1}),
    }


@pytest.mark.parametrize("container", ["zip", "legacy", "bare", "beside"])
def test_pickled_commands_do_not_run(tmp_path, container):
    canary = tmp_path / "canary"
    for name, payload in commands(canary).items():
        path = tmp_path / f"{container}.pt"
        if container == "zip":
            write_pt(path, payload)
        elif container == "beside":  # where the weights themselves are fine
            write_pt(path, {"model": {"w": tensor(0, (2,), (1,))}, "args": payload})
        elif container == "legacy":
            torch.save(payload, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps(payload, 5))
        if container == "beside":
            np.testing.assert_array_equal(read_checkpoint(path).tensors["w"], [0, 0])
        elif container == "bare":
            refused(path, "a pickle, but not one of torch.save")
        else:
            message = refused(path, "no weights in it .it holds:  .the Python object")
            assert name in message, message
            assert "torch.save(model.state_dict()" in message
        assert not canary.exists()


def test_the_canary_can_sing(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(commands(canary)["eval"]))
    assert canary.exists()


OPEN = b"\x80\x02"


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (b"cargparse\nNamespace\n)\x81U\x01x)\x86b.", "no weights"),
        (b"ccollections\nOrderedDict\n}U\x01aK\x01sb.", "no weights"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nU\x01xK\x00))tR.", "damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
        (b"(U\x07storageccollections\nOrderedDict\nU\x010U\x03cpuK\x01tQ.", "no weights"),
        (b"ctorch\nFloatStorage\n)R.", "not callable"),
        (b"K\x01K\x02\x86)R.", "not callable"),
        (b"]K\x01K\x01s.", "damaged"),
        (b"}K\x01a.", "damaged"),
        (b"}]K\x01s.", "a key of type list"),
        (b"}\x8a\x10" + b"\x01" * 16 + b"K\x01s.", "a key of type int"),
        (b"})" + b"\x85" * 100_000 + b"Ns.", "a key of type tuple"),  # a hash of any depth
        (b"})" + b"q\x00h\x00\x86" * 80 + b"Ns.", "a key of type tuple"),  # 2**80 hashes
        (b"\x8f()" + b"q\x00h\x00\x86" * 80 + b"\x90.", "holds: list"),
        (b"()" + b"q\x00h\x00\x86" * 80 + b"\x91.", "holds: list"),
        (b"()" + b"q\x00h\x00\x86" * 80 + b"Nd.", "instruction"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(h\x00NNtR.", "Memo"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00]q\x01(h\x00Nh\x01eR.", "Recursion"),
        (b"(ios\nsystem\n.", "instruction"),
        (b"\x82\x01.", "instruction"),
        (b"I01\n.", "instruction"),
        (b"Pos.system\n.", "instruction"),
        (b"R.", "IndexError"),
        (b"h\x07.", "Memo"),
        (b"", "EOFError"),
        (b"}" * 5000, "EOFError"),
        (b"](" * 100_000 + b"t.", "no weights"),
        (b"\x8d" + b"\xff" * 8 + b"a.", "damaged"),
        (b"\x8e" + struct.pack("<Q", 2**40) + b"a.", "damaged"),
        (b"\x96" + struct.pack("<Q", 2**40) + b"a.", "damaged"),
        (b"\x95" + struct.pack("<Q", 2**40) + b"a.", "damaged"),
        (b"Nr\xff\xff\xff\xff.", "no weights"),  # the C unpickler allocates 64 GiB here
        (b"}U\x05modelctorch.nn\nLinear\n)R}bs.", "model .the Python object torch.nn.Linear"),
    ],
)
def test_strange_programs(tmp_path, program, found):
    started = time.monotonic()
    refused(write_pt(tmp_path / "x.pt", OPEN + program), found)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("known", ["ctorch._utils\n_rebuild_tensor_v2", "cargparse\nNamespace"])
def test_attributes_set_on_what_the_reader_uses(tmp_path, known):
    """A file cannot change how the next one is read."""
    state = b"}U\x0c__defaults__)s}U\x0c__defaults__)s\x86"
    refused(
        write_pt(tmp_path / "x.pt", OPEN + known.encode() + b"\n" + state + b"b."), "no weights"
    )
    test_the_helpers_write_what_is_read(tmp_path)


def test_shared_lists_that_never_end(tmp_path):
    level = ["x"] * 60
    for _ in range(40):
        level = [level] * 60
    args = {"endless": level, "long": [0] * 1000, "dim": 8}
    args["self"] = args
    path = write_pt(tmp_path / "x.pt", {"model": {"w": tensor(0, (2,), (1,))}, "args": args})
    assert read_checkpoint(path).config == {"dim": 8}


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (tensor(0, (7,), (1,)), "reaches element 6; expected at most the 6 elements"),
        (tensor(2, (2, 3), (3, 1)), "reaches element 7"),
        (tensor(0, (2, 2), (5, 1)), "reaches element 6"),
        (tensor(-1, (2,), (1,)), "not whole numbers"),
        (tensor(0, (2,), (-1,)), "not whole numbers"),
        (tensor(0, (2**62, 2**62), (0, 0)), "unfold to tensors of"),
        (tensor(0, (2**62, 2**62, 0), (0, 0, 0)), "is impossible"),
        (tensor(0, (1, 2), (2**70, 1)), "is impossible"),
        (tensor(0, (2,) * 70, (0,) * 70), "do not match"),
        (tensor(0, (2, 3), (1,)), "do not match"),
        (tensor(0, (2**20, 2**10), (0, 0)), "unfold to tensors of"),
        (tensor(0, (6,), (1,), numel=7), "holds 24 bytes; expected 28"),
        (tensor(0, (3,), (1,), kind=torch.DoubleStorage), "holds 24 bytes; expected 48"),
        (tensor(0, (6,), (1,), key="../0"), "storage '../0' is not in the file"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, made, found):
    refused(write_pt(tmp_path / "x.pt", {"model": {"w": made}}), found)


def test_zip_archives_that_torch_does_not_write(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    good = {"x/data.pkl": pickled({"w": tensor(0, (6,), (1,))}), "x/data/0": bytes(24)}
    read_checkpoint(write_zip(path, good.items()))
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(path, [*good.items(), ("x/data/0", bytes(24))])
    refused(path, "'x/data/0': it is there twice")
    for name in ("../x/data/1", "/etc/passwd", "x/../../y"):
        refused(write_zip(path, [*good.items(), (name, b"")]), "leads elsewhere")
    refused(write_zip(path, good.items(), zipfile.ZIP_DEFLATED), "compressed; unpack the archive")
    bomb = [("x/data.pkl", pickled({"w": [0] * 10**6})), *good.items()]
    refused(write_zip(path, bomb[:1], zipfile.ZIP_DEFLATED), "compressed")
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1 << 16)
    for frame in (b"", b"\x95" + struct.pack("<Q", 1 << 17)):  # A frame does not hide them.
        many = b"\x80\x04" + frame + b"N0" * (1 << 16) + b"N."
        refused(write_zip(path, [("x/data.pkl", many)]), "more than 65536 bytes of instructions")
    refused(write_zip(path, [("a.txt", b"")]), "0 members NAME/data.pkl")
    refused(write_zip(path, [*good.items(), ("y/data.pkl", b"")]), "2 members NAME/data.pkl")
    refused(write_zip(path, [*good.items(), ("x/constants.pkl", b"")]), "TorchScript")
    refused(write_zip(path, [*good.items(), ("x/byteorder", b"big")]), "big-endian")
    write_zip(path, good.items())
    path.write_bytes(path.read_bytes().replace(b"x/data/0", b"x/data/9", 1))
    refused(path, "File name in directory .* and header .* differ")


def test_files_of_another_kind(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("x.pt", "x.safetensors", "x.bin"):
        path = tmp_path / name
        for content, found in {
            b"": "is empty", pointer: "Git LFS pointer.*git lfs pull",
            b"<!DOCTYPE html><html>": "a web page", b"just some text": "begins with b'just some",
            b"\x1f\x8b" + bytes(50): "gzip", b"7z\xbc\xaf": "an archive", bytes(300): "zeros",
            b"\xef\xbb\xbf<html>": "a web page", b'{"error": "Invalid name"}': "Invalid name",
            pickle.dumps({"w": [1.0]}): "a pickle, but not one of torch.save",
            pickle.dumps(3, 4)[:-1]: "damaged",
        }.items():  # fmt: skip
            path.write_bytes(content)
            refused(path, found)


def test_cut_anywhere(tmp_path):
    state = {"w": torch.arange(300.0), "b": torch.arange(3)}
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    for name in ("zip.pt", "old.pt", "x.safetensors"):
        whole = (tmp_path / name).read_bytes()
        path = tmp_path / f"cut-{name}"
        for kept in (1, 5, 40, 200, len(whole) // 2, len(whole) - 9, len(whole) - 1):
            path.write_bytes(whole[:kept])
            refused(path, "damaged|cut|begins with|outside|not in the file|holds")


def test_bytes_that_are_not_those_written(tmp_path):
    numbers, path = torch.arange(300.0), tmp_path / "x.pt"
    torch.save({"model": {"w": numbers}, "optimizer": {"v": numbers + 0.5}}, path)
    whole = path.read_bytes()

    def flipped(after):
        data = bytearray(whole)
        data[whole.index(after) + 100] ^= 1
        path.write_bytes(data)

    flipped(numbers.numpy().tobytes())
    refused(path, "tensor 'w': the bytes of its storage '0' have another checksum")
    flipped(b"x/data.pkl")
    refused(path, "member 'x/data.pkl': its bytes have another checksum")
    flipped((numbers + 0.5).numpy().tobytes())  # Not read, since nobody uses it.
    np.testing.assert_array_equal(read_checkpoint(path).tensors["w"], numbers)


def test_checksums_may_be_left_out(tmp_path, monkeypatch):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() == "x/data.pkl"
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "x.pt").tensors["w"], [0, 1, 2])


def test_safetensors_headers_that_lie(tmp_path):
    def write(header, data=bytes(24), length=None):
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", length or len(header)) + header + data)
        return path

    def entry(dtype="F32", shape="[2,3]", offsets="[0,24]"):
        return f'{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'.encode()

    assert read_checkpoint(write(entry())).tensors["w"].shape == (2, 3)
    for path in (
        write(entry(), length=10**9), write(entry(), length=2**63), write(entry(), length=9),
        write(entry(shape="[2,4]")), write(entry(shape="[-2,-3]")), write(entry(shape="3")),
        write(entry(offsets="[4,28]")), write(entry(offsets="[0,2400]")),
        write(entry(dtype="F99")), write(b'{"w":3}'), write(b'{"w":'), write(b"{" * 100_000),
    ):  # fmt: skip
        refused(path, "a damaged or cut safetensors file")
    refused(write(entry(shape=f"[{2**62},{2**62},0]", offsets="[0,0]"), b""), "damaged")


def test_broken_configuration(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    for name, text in {
        "config.json": "{", "config.yaml": "a: !!python/object/apply:os.system [ls]",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            read_checkpoint(tmp_path)
        (tmp_path / name).write_text("[1, 2]")
        with pytest.raises(CheckpointError, match=f"{name}: .*holds a list"):
            read_checkpoint(tmp_path)
        (tmp_path / name).unlink()


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("dim: 0x" + "f" * 6000, "it holds a whole number of more than 128 bits"),
        ("dim: &a [*a]", "it unfolds to more than"),
        (LAUGHS, "it unfolds to more than"),
        ("dim: !!timestamp 'x'", "AttributeError"),
        ("dim: !!bool 'x'", "KeyError: 'x'"),
        ("dim: [8\nx: 3", "ParserError"),
    ],
)
def test_values_of_yaml_that_are_none(tmp_path, text, found):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.yaml: cannot be read: .*{found}") as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "x.safetensors"])
def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path, name):
    if name.startswith("config"):
        torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    (tmp_path / name).symlink_to("blobs/1")
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: .*No such file"):
        read_checkpoint(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")

    def memmap(*_):  # Root may read everything.
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(np, "memmap", memmap)
    refused(tmp_path / "x.pt", "cannot be read: Permission denied; expected a file that this user")


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "x.safetensors"])
def test_random_corruptions(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    model = torch.nn.Linear(2, 2)
    content = {"model": model.state_dict(), "ema": {"w": torch.ones(2).bfloat16()}, "steps": 3}
    if name.endswith("safetensors"):
        safetensors.torch.save_file(content["model"] | content["ema"], tmp_path / name)
    else:
        zipped = name.startswith("zip")
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    whole, rng = (tmp_path / name).read_bytes(), random.Random(0)
    path = tmp_path / f"damaged-{name}"
    outcomes, slowest = {True: 0, False: 0}, 0.0
    for _ in range(1000):
        path.write_bytes(corrupt(whole, rng))
        started = time.monotonic()
        try:
            tensors = read_checkpoint(path, rng.choice(["model", "ema"])).tensors
            assert all(isinstance(x.tobytes(), bytes) for x in tensors.values())
            outcomes[True] += 1
        except CheckpointError as error:
            assert str(path) in str(error)
            outcomes[False] += 1
        slowest = max(slowest, time.monotonic() - started)
    assert min(outcomes.values()) > 5, outcomes
    assert slowest < 2
    assert list((tmp_path / "scratch").iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"scratch", name, path.name}
