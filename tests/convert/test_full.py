"""Full-size published models with weights by rule: recorded outputs, memory and time.

Gigabytes and minutes; the rest of the suite covers the same code at small sizes.
"""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

import detailflow_jax as df
import full_weights
import golden_files
from detailflow_jax.convert import write_pytorch

pytestmark = pytest.mark.full
MODELS = {"tokenizer": "detailflow_128_tokenizer_full", "generator": "detailflow_128_gpt_l_full"}
BUFFER = "quantize.codebook_used"


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """(kind, file with weights by rule, the recorded arrays)."""
    kind = request.param
    name = MODELS[kind]
    path = tmp_path_factory.mktemp(kind) / "weights.pt"
    config = {"block_size": 128} if kind == "generator" else {"group_size": 8, "image_size": 256}
    write_pytorch(full_weights.state_dict(name, not_filled=(BUFFER,)), path, config)
    arrays, _, _ = golden_files.read(name)
    yield kind, path, arrays
    path.unlink()


def first_pass(model, images):
    """Latents as the published encoder gives them, before they are normalised."""
    patches = model.encode_patches(images)
    batch = len(images)
    return model.quant_conv(model.encoder.read(patches, model.encoder.first_queries(batch)))


def check_tokenizer(path, arrays):
    tokenizer = df.load_tokenizer(path)
    codes = tokenizer.encode(arrays["image"])
    sure = arrays["margin"] > 1e-5
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(codes[sure], arrays["indices"][sure])
    images = arrays["image"] / np.float32(127.5) - 1
    latents = tokenizer.network.apply({"params": tokenizer.params}, images, method=first_pass)
    assert golden_files.error(latents, arrays["z"]) <= golden_files.TOKENIZER
    for count, size in ((128, 256), (64, 176), (8, 32)):
        decoded = tokenizer.decode(arrays["indices"][:, :count])
        want = golden_files.nhwc(arrays[f"dec_t{count}_r{size}"])
        assert golden_files.error(decoded, want) <= golden_files.TOKENIZER, count


def check_generator(path, arrays):
    generator = df.load_generator(path)
    logits = generator.logits(arrays["idx"], arrays["cond"])
    got = logits[:, arrays["positions"]]
    assert golden_files.error(got, arrays["logits"]) <= golden_files.GENERATOR
    codes = generator.sample(arrays["cond"], cfg_scale=1.45, greedy=True)
    want = arrays["greedy_cfg1.45"]
    for row in range(len(want)):
        differ = np.flatnonzero(codes[row] != want[row])
        if len(differ):  # what comes after is another sequence
            assert close_call(generator, want[row], int(arrays["cond"][row]), int(differ[0]))


def close_call(generator, codes, label, position):
    """Whether the two most likely codes at a position are within 1e-4, under guidance."""
    labels = [label, generator.config.num_classes]
    both = generator.logits(np.stack([codes, codes]), labels)[:, position]
    top = np.sort(both[1] + 1.45 * (both[0] - both[1]))[-2:]
    return top[1] - top[0] < 1e-4


def test_recorded_numbers(made):
    kind, path, arrays = made
    {"tokenizer": check_tokenizer, "generator": check_generator}[kind](path, arrays)
    jax.clear_caches()


def convert(*args):
    """Runs the command: ({title: text} of its report, seconds of processor time)."""
    before = os.times()
    command = [sys.executable, "-m", "detailflow_jax.convert", *map(str, args)]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = os.times()
    print(done.stdout)  # shown when the test fails
    report = {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}
    spent = after.children_user + after.children_system
    return report, spent - before.children_user - before.children_system


def test_converting_costs_little_and_loses_nothing(made, tmp_path):
    kind, path, _ = made
    ours, back = tmp_path / "ours", tmp_path / "back"
    for args in (("jax", "--src", path, "--dst", ours), ("pytorch", "--src", ours, "--dst", back)):
        report, seconds = convert("--to", *args)
        times = re.search(r"([\d.]+)x the weights", report["memory"])
        assert float(times[1]) < 3
        # Processor time, as others may be at work on the machine; below a minute on two cores.
        assert seconds < 2 * 60
        assert float(report["time"].removesuffix(" s")) < 5 * 60
    assert report["tensors"].startswith("406" if kind == "tokenizer" else "173")
    want, got = (
        torch.load(file, weights_only=True, mmap=True)
        for file in (path, back / "checkpoints" / "128.pt")
    )
    assert list(got) == (["model"] if kind == "tokenizer" else ["model", "ema"])
    assert got["model"].keys() == want["model"].keys()
    for name, x in want["model"].items():
        assert torch.equal(got["model"][name].view(torch.int32), x.view(torch.int32)), name
