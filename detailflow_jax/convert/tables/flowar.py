"""FlowAR in its published names and its published configuration."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, linear
from detailflow_jax.convert.network import Description, Network, any_of
from detailflow_jax.convert.settings import Settings, count_layers, published_fields, unlike
from detailflow_jax.models.flowar import SIZES, FlowAR, FlowARConfig, example
from detailflow_jax.ops import rotary
from detailflow_jax.ops import scales as grids
from detailflow_jax.tasks import flowar as task


def _gated_mlp(name: str, path: str) -> Iterator[Entry]:
    for layer in ("fc1_g", "fc1_x", "fc2"):
        yield from linear(f"{name}.{layer}", f"{path}/{layer}")


def _attention(name: str, path: str, *, bias: bool) -> Iterator[Entry]:
    parts = (f"{path}/{part}_proj" for part in "qkv")
    yield from linear(f"{name}.qkv", *parts, use_bias=bias)
    yield from linear(f"{name}.proj", f"{path}/out_proj")


def _half(name: str, path: str) -> Iterator[Entry]:
    theirs, ours = f"{name}.{{}}", f"{path}/layers"
    yield from _attention(f"{theirs}.attn", f"{ours}/attention", bias=True)
    yield from _gated_mlp(f"{theirs}.mlp", f"{ours}/mlp")
    yield from linear(f"{theirs}.ada_lin.1", f"{ours}/modulation")


def _head_blocks() -> Iterator[Entry]:
    """Both published blocks; a network has the parameters of one of them."""
    theirs, ours = "flownet.res_blocks.{}", "head/blocks/layers"
    yield from _attention(f"{theirs}.attn", f"{ours}/attention", bias=False)
    yield from _gated_mlp(f"{theirs}.mlp", f"{ours}/mlp")
    yield from linear(f"{theirs}.ada_lin", f"{ours}/modulation")
    yield from linear(f"{theirs}.ada_lin_attn", f"{ours}/attention_modulation")
    yield from linear(f"{theirs}.ada_lin_mlp", f"{ours}/mlp_modulation")
    cross = f"{ours}/cross_attention"
    yield from linear(f"{theirs}.crossattn.q", f"{cross}/q_proj", use_bias=False)
    pair = (f"{cross}/k_proj", f"{cross}/v_proj")
    yield from linear(f"{theirs}.crossattn.kv", *pair, use_bias=False)
    yield from linear(f"{theirs}.crossattn.proj", f"{cross}/out_proj")
    yield Entry(f"{theirs}.norm2_1.weight", (f"{ours}/query_norm/scale",))
    yield Entry(f"{theirs}.norm2_2.weight", (f"{ours}/context_norm/scale",))


TABLE = (
    Entry("encoder_pos_embed_learned", ("first_positions",), lead=1),
    Entry("decoder_pos_embed_learned", ("second_positions",), lead=1),
    Entry("diffusion_pos_embed_learned", ("last_positions",), lead=1),
    Entry("class_emb.weight", ("class_embedding/embedding",)),
    *linear("z_proj", "latent_in"),
    Entry("z_proj_ln.weight", ("first_norm/scale",)),
    *_half("encoder_blocks", "first_half"),
    Entry("encoder_norm.weight", ("middle_norm/scale",)),
    *linear("decoder_embed", "middle_in"),
    *_half("decoder_blocks", "second_half"),
    Entry("decoder_norm.weight", ("last_norm/scale",)),
    *linear("flownet.time_embed.mlp.0", "head/time_in"),
    *linear("flownet.time_embed.mlp.2", "head/time_out"),
    *linear("flownet.cond_embed", "head/condition_in"),
    *linear("flownet.input_proj", "head/input"),
    *_head_blocks(),
    *linear("flownet.final_layer.linear", "head/output"),
    *linear("flownet.final_layer.adaLN_modulation.1", "head/final_modulation"),
)

_ROTARY = ("encoder_blocks.{}.attn", "decoder_blocks.{}.attn")
_HEAD_ROTARY = ("flownet.res_blocks.{}.attn", "flownet.res_blocks.{}.crossattn")
_MOST_BLOCKS = 64

SKIPPED = (
    "mask",
    *(f"{name.format(i)}.rope." for name in _ROTARY + _HEAD_ROTARY for i in range(_MOST_BLOCKS)),
)
"""Derived buffers."""

_BUILT = {
    "num_classes": 1000,
    "scales": (1, 2, 4, 8, 16),
    "channels": 16,
    "buffer_size": 0,
    "head_dim": 64,
    "objective": "flow",
}
"""What the published code builds in every size."""

_PUBLISHED = ("FlowAR-S", "FlowAR-L", "FlowAR-H")

_NAMES = {
    "width": ("encoder_embed_dim", "decoder_embed_dim"),
    "first_depth": "encoder_depth",
    "second_depth": "decoder_depth",
    "num_heads": "encoder_num_heads",
    "channels": "vae_embed_dim",
    "num_classes": "class_num",
    "head_depth": "diffloss_d",
    "head_width": "diffloss_w",
    "scales": "scale",
    "buffer_size": "buffer_size",
}


def buffers(config: FlowARConfig) -> dict[str, np.ndarray]:
    """Returns the derived buffers that strict loading asks for, by published name."""
    found = {"mask": np.where(config.mask(), 0.0, -np.inf).astype(np.float32)[None, None]}
    own, head = (
        rotary.frequencies(dim) for dim in (config.width // config.num_heads, config.head_dim)
    )
    head_names = _HEAD_ROTARY if config.head.crosses else _HEAD_ROTARY[:1]
    for name, depth, frequencies in (
        (_ROTARY[0], config.first_depth, own),
        (_ROTARY[1], config.second_depth, own),
        *((name, config.head_depth, head) for name in head_names),
    ):
        found |= {f"{name.format(i)}.rope.freqs": frequencies for i in range(depth)}
    return found


def infer_config(s: Settings) -> FlowARConfig:
    """See `Network.infer_config`."""
    s.by_shape("width", s.size("class_emb.weight", 1))
    s.by_shape("num_classes", s.size("class_emb.weight", 0) - 1)
    s.by_shape("channels", s.size("z_proj.weight", 1))
    s.by_shape("first_depth", count_layers(s.tensors, "encoder_blocks."))
    s.by_shape("second_depth", count_layers(s.tensors, "decoder_blocks."))
    s.by_shape("head_width", s.size("flownet.input_proj.weight", 0))
    s.by_shape("head_depth", count_layers(s.tensors, "flownet.res_blocks."))
    crosses = "flownet.res_blocks.0.crossattn.q.weight" in s.tensors
    s.check("cross", crosses)
    s.by_shape("injection", "spatial_cross" if crosses else "spatial")
    _heads(s)
    _scales(s, s.size("encoder_pos_embed_learned", 1, rank=3))
    return s.build(FlowARConfig)


def _heads(s: Settings) -> None:
    """Heads by the rotary buffers, where they are kept; else by configuration or size."""
    own = s.tensors.get("encoder_blocks.0.attn.rope.freqs")
    if own is not None and own.shape and s.fields["width"] % (4 * own.shape[0]) == 0:
        s.by_shape("num_heads", s.fields["width"] // (4 * own.shape[0]))
    else:
        block = (s.fields["first_depth"], s.fields["width"])
        usual = {(x["first_depth"], x["width"]): x["num_heads"] for x in SIZES.values()}
        s.told("num_heads", int, default=usual.get(block), needed="a divisor of the width")
    head = s.tensors.get("flownet.res_blocks.0.attn.rope.freqs")
    if head is not None and head.shape:
        s.by_shape("head_dim", 4 * int(head.shape[0]))
    else:
        s.told("head_dim", int, default=64)


def _scales(s: Settings, positions: int) -> None:
    """The schedule by override or configuration; else the doubling one of `positions`."""
    buffer = s.overrides.pop("buffer_size", s.published.get("buffer_size", 0))
    given = s.overrides.pop("scales", s.published.get("scale"))
    is_list = given is None or isinstance(given, list | tuple)
    if not is_list or any(type(n) is not int for n in (buffer, *(given or ()))):
        raise CheckpointError(
            f"{s.source}: scales={given!r:.99}, buffer_size={buffer!r:.99}",
            expected="a list of whole numbers, and a whole number",
        )
    doubling = [tuple(2**i for i in range(k)) for k in range(1, 10)]
    fitting = [x for x in doubling if buffer + grids.offsets(x)[-1] == positions]
    scales = tuple(given) if given is not None else next(iter(fitting), None)
    if scales is None or buffer + grids.offsets(scales)[-1] != positions:
        told = "nothing tells its scales" if scales is None else f"scales={scales}"
        raise CheckpointError(
            f"{s.source}: its position tables have {positions} rows, and {told}, "
            f"with buffer_size={buffer}",
            expected="scales=(...) whose squares, with buffer_size, add up to the rows",
        )
    s.fields |= {"scales": scales, "buffer_size": buffer}


def _sides(text: str) -> tuple[int, ...]:
    """ "1,4,16" -> (1, 4, 16)."""
    return tuple(int(part) for part in text.split(","))


def file_name(config: FlowARConfig) -> str:
    """Returns the published name of these widths and depths, such as FlowAR-S, or FlowAR."""
    fields = dataclasses.asdict(config).items()
    return next((name for name, size in SIZES.items() if size.items() <= fields), "FlowAR")


def describe(config: FlowARConfig) -> Description:
    """See `Network.describe`."""
    both = published_fields(config, _NAMES) | {
        "decoder_embed_dim": config.width,
        "decoder_num_heads": config.num_heads,
        "cross": config.head.crosses,
    }
    notices = []
    if config.injection not in ("spatial", "spatial_cross"):
        notices.append(
            f"injection={config.injection!r} has no published counterpart: its tensors are written "
            "under the published names, but the published code cannot build it"
        )
    if file_name(config) not in _PUBLISHED:
        notices.append(
            f"its widths, depths and heads are of none of {', '.join(_PUBLISHED)}, which are all "
            "that the published scripts offer: build its class with the sizes in config.json"
        )
    if other := unlike(config, _BUILT):
        notices.append(
            f"the published code builds another network, with which loading fails or samples are "
            f"wrong: this one has {', '.join(other)}"
        )
    return both, {}, notices


NETWORK = Network(
    name="flowar",
    title="FlowAR model",
    recognise=any_of(("diffusion_pos_embed_learned", "flownet.input_proj.weight")),
    module=FlowAR,
    example=example,
    table=TABLE,
    skipped=SKIPPED,
    infer_config=infer_config,
    from_run=task.model_config,
    describe=describe,
    names=_NAMES,
    options={
        "num_heads": (int, "attention heads"),
        "scales": (_sides, "sides of the scales, such as 1,4,16"),
        "buffer_size": (int, "class tokens in front of the sequence"),
    },
    buffers=buffers,
    file_name=file_name,
    weights="ema",
    ema_key="model_ema",
    wants={"bare": "eval.py"},
)
