"""The sampling benchmark: what it compares is the same computation, and what it counts is right."""

import dataclasses
import json
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.inference import api
from detailflow_jax.models import flow_sampler, flowar, generator

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import flowar_sampling
import measuring
import sampling

TINY = {
    "width": 16, "first_depth": 1, "second_depth": 1, "num_heads": 2, "scales": (1, 2),
    "channels": 3, "num_classes": 4, "head_width": 16, "head_depth": 1, "head_dim": 8,
}  # fmt: skip


def case_of(network, params, *options, steps=2):
    args = sampling.parse(["--system", "flowar", "--batch", "2", *options])
    return flowar_sampling.make_case(network, params, args, steps)


def large_params(init, *args, draw=measuring.random_params):
    """Weights with which the transformer matters to the latents."""
    return jax.tree.map(lambda x: 20 * x, draw(init, *args))


@pytest.mark.full
def test_the_parts_and_the_way_without_a_cache_are_those_of_the_sampler():
    network = flowar.FlowAR(flowar.FlowARConfig(**TINY, buffer_size=2, scan=False))
    params = large_params(network.init, *flowar.example(network.config))
    case = case_of(network, params)

    def whole(*arguments):
        return list(flow_sampler.sample_scales(network, *arguments, options=case.options))

    semantics, latents = zip(*jax.jit(whole)(*case.arguments[1:]), strict=True)
    for kind in (flow_sampler.Sampling, flowar_sampling.Recomputed):
        check(flowar_sampling.transformer(case, latents, kind), semantics)
    check(flowar_sampling.head(case, semantics, case.noise()), latents)


def check(parts, wanted):
    for part, right in zip(parts, wanted, strict=True):
        np.testing.assert_allclose(part, right, atol=1e-5 * np.abs(right).max(), rtol=0)


@pytest.mark.full
def test_the_arithmetic_of_flowar_s():
    """Multiply-adds of the linear layers by hand; attention's own products are a few per cent."""
    network = flowar.FlowAR(flowar.FlowARConfig(**flowar.SIZES["FlowAR-S"]))
    assert flowar_sampling.positions(network.config) == (341, 453)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *flowar.example(network.config))
    case = case_of(network, nn.unbox(shapes)["params"], steps=25)
    noise = [jax.ShapeDtypeStruct((2, side**2, 16), jnp.float32) for side in (1, 2, 4, 8, 16)]
    semantics = [jax.ShapeDtypeStruct((4, side**2, 768), jnp.float32) for side in (1, 2, 4, 8, 16)]

    cached, recomputed = flowar_sampling.transformer_flops(case, noise)
    a_position = 2 * (12 * (4 * 768**2 + 3 * 768 * 2048) + 768**2)
    assert 1.0 < cached / (4 * 341 * a_position) < 1.1
    assert 1.0 < recomputed / (4 * 453 * a_position) < 1.1

    sampled, full = flowar_sampling.head_flops(case, semantics, noise)
    a_position = 2 * (2 * (6 * 1024**2 + 4 * 1024**2 + 3 * 1024 * 2730) + 1024 * (768 + 2048 + 32))
    # 24 steps; two begin above the time 0.9, and the first scale is not guided at all.
    assert 1.0 < sampled / (2 * (24 + 340 * (2 + 2 * 22)) * a_position) < 1.05
    assert 1.0 < full / (2 * 341 * 2 * 24 * a_position) < 1.05
    never = dataclasses.replace(case.options, guidance_high=-1.0)
    sampled, again = flowar_sampling.head_flops(
        dataclasses.replace(case, options=never), semantics, noise
    )
    assert again == full == 2 * sampled


@pytest.mark.parametrize("scan", [None, True, False])
def test_layers_are_laid_out_as_asked(scan, monkeypatch):
    monkeypatch.setitem(flowar.SIZES, "FlowAR-S", TINY)
    network, params = flowar_sampling.make_network("FlowAR-S", "float32", scan)
    assert network.config.scan == (api.scans() if scan is None else scan)
    wanted = nn.unbox(
        jax.eval_shape(network.init, jax.random.key(0), *flowar.example(network.config))
    )["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.full
def test_flowar_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setitem(flowar.SIZES, "FlowAR-S", TINY)
    monkeypatch.setattr(measuring, "random_params", large_params)
    command = "--system flowar --size S --batch 2 --num_steps 4 --annealed 2 --repeats 1 --no-scan"
    command += " --guidance_high 1"  # at every step of a scale or at none: less to compile
    sampling.main([*command.split(), "--json"])
    found = json.loads(capsys.readouterr().out)
    first, second = found["rows"]
    assert (first["steps"], second["steps"]) == ([4, 4], [4, 2])
    assert second["flops"] < first["flops"]
    for row in found["rows"]:
        assert row["seconds"] == pytest.approx(row["transformer"] + row["head"] + row["rest"])
    assert found["largest difference"] < 1e-5 * found["largest latent"]
    text = flowar_sampling.table(sampling.parse(command.split()), found)
    assert "batch 2, cfg_scale 4.3, guidance_high 1, float32, unrolled layers" in text
    assert "\n4 " in text and "\n4, 2 " in text


def test_detailflow_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setitem(
        generator.SIZES, "GPT-L", {"width": 16, "depth": 1, "num_heads": 2, "group_size": 2}
    )
    monkeypatch.setattr(measuring, "memory_bandwidth", lambda: 1e9)
    sampling.main(["--tokens", "4", "--batch", "2", "--repeats", "1", "--tokenizer", "", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (
        found["equal codes"] == 1.0 and found["steps"] == 3 and found["arithmetic ratio"] == 7 / 4
    )
    assert found["system"] == "detailflow" and "num_steps" not in found


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("--num_steps 25", "--num_steps belongs to --system flowar"),
        ("--system flowar --tokens 128", "--tokens belongs to --system detailflow"),
        ("--system flowar --size M", "--size FlowAR-M: expected one of FlowAR-S, FlowAR-B"),
        ("--size S", "--size S: expected one of GPT-B"),
        ("--system flowar --annealed 1", "num_steps=1; the published grid needs at least 2"),
        ("--system flowar --cfg_scale 0.5", "expected >= 1"),
        ("--system flowar --repeats 0", "expected at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(command, text, capsys):
    with pytest.raises(SystemExit):
        sampling.parse(command.split())
    assert text in capsys.readouterr().err


def test_settings_are_those_published_for_the_size():
    args = sampling.parse(["--system", "flowar", "--size", "FlowAR-H"])
    assert (args.size, args.cfg_scale, args.guidance_high, args.num_steps) == (
        "FlowAR-H", 2.4, 0.7, 50,
    )  # fmt: skip
    assert sampling.parse([]).size == "GPT-L" and sampling.parse([]).cfg_scale == 1.5
