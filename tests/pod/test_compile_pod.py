"""Compiling for a TPU pod on a CPU: what is read from programs, and the real compiler."""

import dataclasses
import json
import pathlib
import platform
import re
import runpy
import types

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from detailflow_jax.pod import (
    advice,
    collectives,
    cycles,
    flops,
    hlo,
    meshes,
    programs,
    report,
    topologies,
    traffic,
)
from detailflow_jax.pod import command as compile_pod
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError, UserError
from detailflow_jax.tasks import make_task

ROOT = pathlib.Path(__file__).resolve().parents[2]
GENERATOR = f"{ROOT}/configs/generator.py:detailflow_16:"
needs_compiler = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the TPU compiler exists for Linux on x86-64 only",
)

# Lines as the TPU compiler writes them, shortened: a loop of 7 rounds from 1 to 15 in steps of 2,
# whose limit stands in a fusion; the pieces of one all-gather; a reduce-scatter; a product written
# as a convolution with gaps.
TEXT = (pathlib.Path(__file__).parents[1] / "fixtures" / "compiled_program.hlo").read_text()


def read() -> tuple[hlo.Module, list[hlo.Execution]]:
    module = hlo.parse(TEXT)
    return module, hlo.executions(module)


# ------------------------------------------------------------------------------- reading programs


def test_loops_run_as_often_as_their_counters_say():
    module, executions = read()
    times = {execution.computation.name: execution.times for execution in executions}
    assert times["main"] == 1 and times["body"] == 7 and times["slices"] == 7
    assert not any(execution.unknown for execution in executions)
    assert {e.computation.name for e in executions if not e.fused} == {"main", "body"}
    shape = module.computations["main"].instructions["k"].shapes[0]
    assert (shape.dims, shape.bytes, shape.space) == ((2, 128, 16, 64), 2 * 2**18, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} parameter(3)"),
        ("add(%kept, %two)", "multiply(%kept, %two)"),
        ("direction=LT", "direction=NE"),
    ],
)
def test_a_loop_of_unknown_length_is_said_to_be_one(old, new):
    assert old in TEXT
    executions = hlo.executions(hlo.parse(TEXT.replace(old, new)))
    body = next(e for e in executions if e.computation.name == "body")
    assert body.unknown and body.times == 1


def test_text_that_is_no_program_is_refused():
    with pytest.raises(hlo.HloError, match="ENTRY"):
        hlo.parse("error: something else")


KERNELS = """ENTRY %main (q: bf16[2,4,384,64], k: bf16[2,4,384,64]) -> bf16[2,4,384,64] {
  %q = bf16[2,4,384,64]{3,2,1,0} parameter(0)
  %k = bf16[2,4,384,64]{3,2,1,0} parameter(1)
  %splash_mha_fwd_residuals.1 = bf16[2,4,384,64]{3,2,1,0} custom-call(%q, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 384}"
}}, metadata={op_name="jit(loss)/splash"}
  ROOT %y = bf16[2,4,384,64]{3,2,1,0} add(%splash_mha_fwd_residuals.1, %q), \
backend_config={"estimated_cycles":"77"}
}"""


def test_a_program_is_read_past_the_lines_of_its_kernels():
    module = hlo.parse(KERNELS)
    executions = hlo.executions(module)
    once = 2 * (2 * 4 * 384 * 384 * 64) * 2  # scores, and sums of values
    assert flops.kernels(executions) == (once, 2 * once)  # 64 of 128 rows of the matrix unit
    assert cycles.estimated(executions) == 77
    array = 2 * 2 * 4 * 384 * 64
    assert traffic.memory_bytes(module, executions) == 2 * 3 * array


def test_flops_count_real_products_and_every_round():
    _, executions = read()
    scores = 2 * (2 * 16 * 128 * 128) * 64  # 2 x 16 products [128, 64] x [64, 128]
    product = 2 * 64 * 64 * 128
    assert flops.executed(hlo.parse(TEXT), executions)[0] == scores + 7 * product


def test_convolution_flops_leave_out_padding():
    text = """ENTRY %main (x: f32[1,4,4,3], w: f32[3,3,3,5]) -> f32[1,4,4,5] {
  %x = f32[1,4,4,3]{3,2,1,0} parameter(0)
  %w = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %y = f32[1,4,4,5]{3,2,1,0} convolution(%x, %w), ATTRIBUTES
}"""
    attributes = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    attributes += ", operand_precision={highest,highest}"
    text = text.replace("ATTRIBUTES", attributes)
    module = hlo.parse(text)
    pairs = 2 + 3 + 3 + 2  # (kernel, output) positions along an axis that meet an input
    once = 2 * pairs * pairs * 3 * 5
    assert flops.executed(module, hlo.executions(module)) == (once, 6 * once)


def test_memory_traffic_counts_slices_and_leaves_out_on_chip_memory():
    module, executions = read()
    layer = 64 * 128 * 2  # read by the fusion in each round; all else of the body is on the chip
    product = 2 * 128 * 16 * 64 * 2 + 2 * 16 * 128 * 128 * 4  # %q and the result; %k is on the chip
    start = 2 * 4
    counters = 7 * (2 + 3 + 1) * 4  # copy: in and out; add: two in, one out; the slice's index
    found = traffic.memory_bytes(module, executions)
    assert found == 7 * layer + product + start + counters


def test_collectives_with_their_groups_and_bytes():
    module, executions = read()
    scatter, gather = collectives.find(module, executions, 16)
    size = 64 * 128 * 2
    assert (scatter.kind, scatter.size, scatter.times) == ("reduce-scatter", size, 7)
    assert scatter.group == (0, 1, 2, 3)
    # Two pieces of one collective; the ids are transposed, and so is the axis of the groups.
    assert (gather.kind, gather.size, gather.times) == ("all-gather", size, 7)
    assert gather.group == (0, 1, 2, 3)
    assert scatter.waits and not gather.waits  # The pieces run beside other work.
    sent = size * 3 / 4
    assert collectives.totals([scatter, gather]) == {
        "all-gather": {"count": 7, "bytes": 7 * sent},
        "reduce-scatter": {"count": 7, "bytes": 7 * sent},
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups=[4,4]<=[16]", (0, 1, 2, 3)),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5, 8, 9, 12, 13)),
        ("replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}", (0, 4, 8, 12)),
        ("replica_groups={}", tuple(range(16))),
    ],
)
def test_groups_in_every_notation(groups, expected):
    text = f"""ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}"""
    module = hlo.parse(text)
    [found] = collectives.find(module, hlo.executions(module), 16)
    assert found.group == expected
    assert found.sent == 2 * 16 * (len(expected) - 1) / len(expected)


def test_links_follow_from_the_place_in_the_torus():
    coords = np.stack(np.unravel_index(np.arange(256), (16, 16)), axis=1)
    large, half = topologies.find("v5e-256"), topologies.find("v5e-128")
    assert collectives.links(range(256), coords, large) == 4
    assert collectives.links(range(16), coords, large) == 2  # a row, closed to a ring
    assert collectives.links(range(8), coords, large) == 1  # half a row: one way along a line
    assert collectives.links(range(128), coords, half) == 3  # 8 x 16: one side is no ring
    whole = collectives.Collective("all-reduce", 2**20, tuple(range(256)), 3)
    expected = 3 * 2 * 2**20 * 255 / 256 / (4 * 50e9)
    assert collectives.seconds([whole], coords, large) == pytest.approx(expected)


# ------------------------------------------------------------------------- slices and meshes


@pytest.mark.parametrize(
    ("name", "chips", "compiler_name"),
    [
        ("v5e-16", 16, "v5e:4x4"),
        ("v5e-256", 256, "v5e:16x16"),
        ("v6e-256", 256, "v6e:16x16"),
        ("v5p-16", 8, "v5:2x2x2"),
        ("v5p-128", 64, "v5:4x4x4"),
        ("v5p-1024", 512, "v5:8x8x8"),
        ("v5p:4x4x8", 128, "v5:4x4x8"),
    ],
)
def test_topology_table(name, chips, compiler_name):
    found = topologies.find(name)
    assert (found.chips, found.compiler_name) == (chips, compiler_name)


@needs_compiler
def test_the_compiler_knows_every_slice_of_the_table():
    for name in topologies.SLICES:
        topology = topologies.find(name)
        devices = topologies.devices(topology)
        places = {tuple(device.coords[: len(topology.shape)]) for device in devices}
        assert len(devices) == len(places) == topology.chips, name
        assert max(places) == tuple(size - 1 for size in topology.shape), name


@pytest.mark.parametrize("where", ["make", "train_step"])
def test_a_bug_in_a_forked_task_keeps_its_traceback(where, monkeypatch):
    def broken(*args, **options):
        raise ValueError("a bug in forked code")

    make = broken
    if where == "train_step":
        make = lambda config: dataclasses.replace(make_task(config), train_step=broken)  # noqa: E731
    monkeypatch.setattr(programs, "make_task", make)
    size = ("width=32", "depth=1", "num_heads=2", "num_tokens=16", "codebook_size=64")
    overrides = [f"--config.model.{field}" for field in (*size, "num_classes=4", "group_size=4")]
    config = load_config(f"{ROOT}/configs/generator.py:digits", overrides)
    with pytest.raises(ValueError, match="a bug in forked code") as raised:
        programs.compile_program(programs.train_program(config, sharding.make_mesh({})))
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize("name", ["v5e-17", "v4-8", "v5p:4x4", "v5e:", ""])
def test_unknown_slice_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"unknown topology.*v5e-256.*v5p-128"):
        topologies.find(name)


def test_mesh_of_the_command_line():
    assert meshes.parse("fsdp=8") == {"data": -1, "fsdp": 8}
    assert meshes.parse("data=2, fsdp=-1,tensor=4") == {"data": 2, "fsdp": -1, "tensor": 4}
    for wrong in ("fsdp", "model=2", "fsdp=two", "fsdp=8 tensor=2"):
        with pytest.raises(ConfigError, match="cannot read --mesh"):
            meshes.parse(wrong)


@pytest.mark.parametrize(
    ("size", "what", "name", "expected"),
    [
        ("GPT-L", "train", "v5e-256", 128),  # Gathers over all 256 would be all-reduces.
        ("GPT-L", "train", "v5p-128", 32),  # So would those over the whole slice.
        ("GPT-3B", "sampler", "v5e-256", 4),  # 12.4 GB of float32, a third of 16.9 GB
    ],
)
def test_auto_takes_the_fsdp_that_should_be_fastest(size, what, name, expected):
    config, topology = load_config(GENERATOR + f"size={size}"), topologies.find(name)
    ranked = meshes.ranked(config, what, topology, topologies.devices(topology))
    assert ranked[0].sizes["fsdp"] == expected
    assert not ranked[0].falls_back
    whole = next(each for each in ranked if each.sizes["fsdp"] == topology.chips)
    assert whole.falls_back


@needs_compiler
def test_a_state_that_leaves_no_room_is_split():
    config, topology = load_config(GENERATOR + "size=GPT-XL"), topologies.find("v5e-16")
    ranked = meshes.ranked(config, "train", topology, topologies.devices(topology))
    assert ranked[-1].sizes["fsdp"] == 1  # 11.2 GiB of 15.75
    assert ranked[0].state < 0.5 * topology.chip.memory


def test_state_is_four_times_the_parameters_and_split():
    config = load_config(GENERATOR + "size=GPT-B")
    one, eight = (AbstractMesh((1, n, 1), sharding.AXES) for n in (1, 8))

    def state_bytes(what, mesh):
        return programs.bytes_a_chip(programs.state(config, what, mesh))

    params = state_bytes("sampler", one)
    assert params == pytest.approx(4 * 99e6, rel=0.05)  # float32
    state = state_bytes("train", one)
    assert state == pytest.approx(4 * params, rel=1e-4)  # two moments and the average
    assert state_bytes("train", eight) == pytest.approx(state / 8, rel=0.01)


@needs_compiler
def test_arrays_that_fsdp_leaves_whole_are_named():
    config = load_config(GENERATOR + "size=GPT-3B")
    topology = topologies.find("v5e-256")
    devices = topologies.devices(topology)
    whole = programs.train_program(config, sharding.make_mesh({"fsdp": 256}, devices)).whole
    assert whole["params/blocks/layers/w1/kernel [24,3200,8704]"] == 4 * 24 * 3200 * 8704
    assert not programs.train_program(config, meshes.auto(config, "train", topology, devices)).whole


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("memory required for HLO temporaries (63.62G) exceeds available HBM (15.75G).", 63.62),
        ("Ran out of memory in memory space hbm. Used 17.51G of 15.75G hbm. Exceeded", 17.51),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_needed_memory_is_read_from_the_compilers_messages(message, expected):
    found = programs.needed(message)
    assert found == (expected and int(expected * 2**30))


# --------------------------------------------------------------------------- the real compiler

WIDTH, DEPTH, TOKENS, CODES, HEAD_DIM = 256, 3, 128, 8192, 64
TINY = [
    "--config",
    GENERATOR + "runlocal",
    f"--config.model.width={WIDTH}",
    f"--config.model.depth={DEPTH}",
    "--config.batch_size=64",
    "--topology=v5e-16",
]


def compiled(capsys, *arguments: str) -> dict:
    assert compile_pod.main([*TINY, *arguments, "--json"]) == compile_pod.COMPILED
    found = json.loads(capsys.readouterr().out)
    assert report.text(found).count("\n") > 10
    return found


def matrix_parameters() -> int:
    """N: parameters that take part in matrix products, embeddings left out."""
    mlp_dim = -(-int(8 * WIDTH / 3) // 256) * 256
    return DEPTH * (4 * WIDTH**2 + 3 * WIDTH * mlp_dim) + WIDTH * CODES


def turns() -> int:
    """FLOPs of the products that turn a token's queries and keys in all layers, forward."""
    return DEPTH * 2 * 2 * WIDTH * HEAD_DIM


@pytest.mark.full
@needs_compiler
def test_train_step_on_a_pod(capsys):
    found = compiled(capsys, "--mesh=fsdp=4")
    assert found["mesh"] == {"data": 4, "fsdp": 4, "tensor": 1}
    # 6 N a token, and twice 4 T D (scores, and sums of values) forward, thrice that with backward;
    # the gradient of a turn is another one.
    attention = DEPTH * 4 * TOKENS * WIDTH
    expected = 64 * TOKENS * (6 * matrix_parameters() + 3 * attention + 2 * turns())
    assert found["flops_written_pod"] == pytest.approx(expected, rel=0.01)
    assert 16 * found["flops"] == pytest.approx(expected, rel=0.02)
    assert found["unknown_loops"] == 0

    state = found["memory"]["arguments"]
    whole = 16 * (matrix_parameters() + WIDTH * (CODES + 1001 + 7))
    assert whole / 4 < state < 1.05 * whole / 4
    assert state < found["memory"]["peak"] < 0.1 * topologies.find("v5e-16").chip.memory
    assert found["memory_share"] == found["memory"]["peak"] / topologies.CHIPS["v5e"].memory
    gathered = found["collectives"]["all-gather"]
    assert gathered["count"] >= 2 * DEPTH  # in every layer, forward and backward
    blocks = 2 * (matrix_parameters() - WIDTH * CODES) * 3 / 4  # bfloat16, three parts of four
    assert gathered["bytes"] > 1.9 * blocks

    seconds, waiting = found["seconds"], found["waiting_seconds"]
    core = max(seconds[name] for name in ("compute", "HBM", "cycles"))
    assert found["step_seconds"] == max(core + waiting, seconds["interconnect"])
    assert seconds["cycles"] > seconds["compute"]  # Small products never reach the peak.
    assert 0 <= waiting <= seconds["interconnect"]
    assert found["seconds"]["compute"] == pytest.approx(found["flops"] / 197e12)
    assert found["images_per_second_pod"] == pytest.approx(64 / found["step_seconds"])
    assert found["chip_hours"] == pytest.approx(20 * found["step_seconds"] / 3600 * 16)


@pytest.mark.full
@needs_compiler
def test_sampler_on_a_pod(capsys):
    found = compiled(capsys, "--what=sampler", "--batch_size=32")
    # Under guidance 64 rows; 128 tokens run once each, and see the whole cache and their own group.
    steps = [1] * 8 + [8] * 15
    attention = DEPTH * 4 * WIDTH * sum(m * (TOKENS + m) for m in steps)
    expected = 64 * ((2 * matrix_parameters() + turns()) * TOKENS + attention)
    assert found["flops_written_pod"] == pytest.approx(expected, rel=0.01)
    assert 16 * found["flops"] == pytest.approx(expected, rel=0.05)
    assert found["steps"] == -(-50_000 // 32)


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "words"),
    [  # too many parameters; too many activations
        (["model.width=8192", "model.num_heads=64"], ["--mesh data=", "now 1"]),
        pytest.param(
            ["batch_size=131072"],
            ["--config.batch_size=", "now 131072", "accumulate="],
            marks=pytest.mark.full,
        ),
    ],
)
def test_what_does_not_fit_ends_with_advice(capsys, arguments, words):
    overrides = [f"--config.{argument}" for argument in arguments]
    assert compile_pod.main([*TINY, *overrides]) == compile_pod.DOES_NOT_FIT
    said = capsys.readouterr().err
    for expected in (*words, "GiB more than the 15.75 GiB", "remat=full", "--topology"):
        assert expected in said, said
    assert "Traceback" not in said
    best = re.search(r"fsdp=(\d+)|batch_size=(\d+)", said)
    assert 1 < int(best[1] or best[2]) < 131072


@pytest.mark.parametrize("variant", ["detailflow_16:plain", "detailflow_16"])
def test_a_discriminator_takes_a_whole_batch(variant):
    """Accumulation, which it rejects, is advised without one only."""
    error = programs.DoesNotFit("", used=20 * topologies.GIB, state=topologies.GIB)
    mesh = types.SimpleNamespace(shape={"data": 16, "fsdp": 1})
    program = types.SimpleNamespace(name="train", images=4096, mesh=mesh)
    config = load_config(f"{ROOT}/configs/tokenizer.py:{variant}", [])
    said = advice.suggest(error, program, config, topologies.find("v5e-16"))
    assert "--config.batch_size=" in said
    assert ("--config.accumulate=" in said) == variant.endswith("plain")


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.batch_size=12"], ["batch_size=12", "multiple of 16"]),
        (["--mesh=fsdp=5"], ["fsdp=5", "16 devices"]),
        (["--what=sampler", "--batch_size=9"], ["batch_size=9", "multiple of 16"]),
        (["--config.data.source=bucket"], ["bucket", "codes:DIR"]),
        (["--config.accumulate=3"], ["accumulate=3"]),
        (["--config.modle.width=2"], ["modle.width"]),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, arguments, words):
    assert compile_pod.main([*TINY, *arguments]) == compile_pod.UNUSABLE
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(word in said for word in words), said


def test_the_document_is_what_the_script_makes_of_its_results():
    script = runpy.run_path(str(ROOT / "benchmarks" / "tpu_pods.py"))
    results = json.loads(script["RESULTS"].read_text())
    text = script["table"](results)
    assert script["TABLE"].read_text() == text
    assert text.count("\n## ") == len({name.partition(" | ")[0] for name in results})
    missing = {"fits": False, "needed_bytes": 20 * 2**30}
    assert "does not fit: 20.0 GiB" in script["_row"]("v5e-16", missing)
