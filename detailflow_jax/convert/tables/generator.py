"""The DetailFlow generator in its published names and its published configuration."""

from typing import Any

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry
from detailflow_jax.convert.settings import Settings, count_layers
from detailflow_jax.models.generator import SIZES, GeneratorConfig

_LAYER, _OURS = "layers.{}", "blocks/layers"
_SPECIAL = "spe_tok_embeddings.special_embeddings.weight"

TABLE = (
    Entry("cls_embedding.embedding_table.weight", ("class_embedding/embedding",)),
    Entry("tok_embeddings.weight", ("token_embedding/embedding",)),
    Entry(
        f"{_LAYER}.attention.wqkv.weight",
        tuple(f"{_OURS}/attention/{part}_proj/kernel" for part in "qkv"),
        transpose=True,
    ),
    Entry(f"{_LAYER}.attention.wo.weight", (f"{_OURS}/attention/out_proj/kernel",), transpose=True),
    *(
        Entry(f"{_LAYER}.feed_forward.{w}.weight", (f"{_OURS}/{w}/kernel",), transpose=True)
        for w in ("w1", "w3", "w2")
    ),
    Entry(f"{_LAYER}.attention_norm.weight", (f"{_OURS}/attention_norm/scale",)),
    Entry(f"{_LAYER}.ffn_norm.weight", (f"{_OURS}/ffn_norm/scale",)),
    Entry("norm.weight", ("final_norm/scale",)),
    Entry("output.weight", ("output/kernel",), transpose=True),
    Entry(_SPECIAL, ("special_embedding/embedding",)),
)

SKIPPED = ("freqs_cis", "mask", "group_causal_mask")
"""Derived buffers."""

SIGNS = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight")
"""Names by which such a checkpoint is known."""

_BLOCK = {(size["depth"], size["width"]): size["num_heads"] for size in SIZES.values()}


def buffers(config: GeneratorConfig) -> dict[str, np.ndarray]:
    """What strict loading asks for besides: in groups of one, a table of no special embeddings."""
    return {_SPECIAL: np.zeros((0, config.width), np.float32)} if config.group_size == 1 else {}


def infer_config(s: Settings) -> GeneratorConfig:
    """The network that these tensors are of."""
    s.only("cls_token_num", 1, "so a class is several positions")
    s.only("model_type", "c2i", "so it is not conditioned on classes")
    s.only("rope_base", 10000, "so its rotary frequencies are others")
    s.only("norm_eps", 1e-5, "so its norms are others")
    s.by_shape("codebook_size", s.size("tok_embeddings.weight", 0), ["vocab_size"])
    s.by_shape("width", s.size("tok_embeddings.weight", 1), ["dim"])
    s.by_shape("depth", count_layers(s.tensors, "layers."), ["n_layer"])
    classes = s.size("cls_embedding.embedding_table.weight", 0) - 1  # the last is the null class
    s.by_shape("num_classes", classes, ["num_classes"])
    group = s.size(_SPECIAL, 0) + 1
    s.by_shape("group_size", group, ["group_size"])
    _heads(s, rows=s.size("layers.0.attention.wqkv.weight", 0))
    _hidden(s, s.size("layers.0.feed_forward.w1.weight", 0))
    why = "as in DetailFlow-16; pass num_tokens=256 or 512 if it is of another tokenizer"
    s.told("num_tokens", int, ["block_size"], default=128, why=why)
    s.told("causal_num", int, signed=True)  # 0 is allowed; the network checks the rest
    rates = ["class_dropout", "token_dropout", "residual_dropout"]
    return s.build(GeneratorConfig, [*rates, "dtype", "scan", "remat"])


def _heads(s: Settings, rows: int) -> None:
    """Query heads by override, configuration or published size; key/value heads by shape."""
    width, depth = s.fields["width"], s.fields["depth"]
    named = SIZES.get(str(s.published.get("gpt_model")))
    if named and (named["depth"], named["width"]) != (depth, width):
        said = f"{s.published['gpt_model']}, {named['depth']} layers of width {named['width']}"
        s.contradict("gpt_model", said, f"{depth} layers of width {width}")
    usual = _BLOCK.get((depth, width))
    heads = s.told("num_heads", int, ["n_head"], default=usual)
    if heads is None or width % heads or (rows - width) % (2 * (width // heads)):
        raise CheckpointError(
            f"{s.source}: a generator of {depth} layers, width {width} and {heads} heads, with "
            f"{rows} rows of queries, keys and values",
            expected="num_heads=..., a divisor of the width; shapes do not tell it",
            remedy="Pass num_heads.",
        )
    kv_heads = (rows - width) // (2 * (width // heads))
    if kv_heads < 1 or heads % kv_heads:
        s.contradict("n_head", str(heads), f"{kv_heads} key/value heads")
    s.by_shape("num_kv_heads", kv_heads, ["n_kv_head"])
    if kv_heads == heads:
        s.fields["num_kv_heads"] = None


def _hidden(s: Settings, hidden: int) -> None:
    """`multiple_of` such that the hidden width comes out as it is."""
    least = int(8 * s.fields["width"] / 3)
    usual = s.overrides.get("multiple_of") or s.published.get("multiple_of") or 256
    for multiple in (usual, hidden):
        if isinstance(multiple, int) and -(-least // multiple) * multiple == hidden:
            break
    else:
        raise CheckpointError(
            f"{s.source}: hidden layers of width {hidden}",
            expected=f"at least {least}, 8/3 of the width {s.fields['width']}",
            remedy="Such a network is not supported here.",
        )
    names = [] if s.published.get("ffn_dim_multiplier") else ["multiple_of"]
    s.by_shape("multiple_of", multiple, names)


def describe(config: GeneratorConfig) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The published configuration of a network.

    Returns:
      `config.json`, exactly fields that the published code knows; what `config.yaml` holds beside
      them; notices.
    """
    both = {
        "dim": config.width,
        "n_layer": config.depth,
        "n_head": config.num_heads,
        "n_kv_head": config.num_kv_heads,
        "multiple_of": config.multiple_of,
        "vocab_size": config.codebook_size,
        "block_size": config.num_tokens,
        "num_classes": config.num_classes,
        "group_size": config.group_size,
        "causal_num": config.causal_num,
        "cls_token_num": 1,
    }
    block = {"depth": config.depth, "num_heads": config.num_heads, "width": config.width}
    name = next((name for name, size in SIZES.items() if size == block), None)
    if name:
        return both, {"gpt_model": name}, []
    notice = (
        f"{config.depth} layers of width {config.width} with {config.num_heads} heads are none of "
        "the published sizes, so gpt_model is left out and the published code cannot build it"
    )
    return both, {}, [notice]
