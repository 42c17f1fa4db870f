"""The DetailFlow generator in its published names and its published configuration."""

import functools

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, linear
from detailflow_jax.convert.network import Description, Network, any_of
from detailflow_jax.convert.settings import Settings, count_layers, published_fields
from detailflow_jax.models.flow_generator import example, make_generator
from detailflow_jax.models.generator import SIZES, GeneratorConfig
from detailflow_jax.tasks import generator as task

_LAYER, _OURS = "layers.{}", "blocks/layers"
_SPECIAL = "spe_tok_embeddings.special_embeddings.weight"
_linear = functools.partial(linear, use_bias=False)

TABLE = (
    Entry("cls_embedding.embedding_table.weight", ("class_embedding/embedding",)),
    Entry("tok_embeddings.weight", ("token_embedding/embedding",)),
    *_linear(f"{_LAYER}.attention.wqkv", *(f"{_OURS}/attention/{part}_proj" for part in "qkv")),
    *_linear(f"{_LAYER}.attention.wo", f"{_OURS}/attention/out_proj"),
    *_linear(f"{_LAYER}.feed_forward.w1", f"{_OURS}/w1"),
    *_linear(f"{_LAYER}.feed_forward.w3", f"{_OURS}/w3"),
    *_linear(f"{_LAYER}.feed_forward.w2", f"{_OURS}/w2"),
    Entry(f"{_LAYER}.attention_norm.weight", (f"{_OURS}/attention_norm/scale",)),
    Entry(f"{_LAYER}.ffn_norm.weight", (f"{_OURS}/ffn_norm/scale",)),
    Entry("norm.weight", ("final_norm/scale",)),
    *_linear("output", "output"),
    Entry(_SPECIAL, ("special_embedding/embedding",)),
)

SKIPPED = ("freqs_cis", "mask", "group_causal_mask")
"""Derived buffers."""

_NAMES = {
    "width": "dim",
    "depth": "n_layer",
    "num_heads": "n_head",
    "num_kv_heads": "n_kv_head",
    "multiple_of": "multiple_of",
    "codebook_size": "vocab_size",
    "num_tokens": "block_size",
    "num_classes": "num_classes",
    "group_size": "group_size",
    "causal_num": "causal_num",
}
_HEADS = {(size["depth"], size["width"]): size["num_heads"] for size in SIZES.values()}


def infer_config(s: Settings) -> GeneratorConfig:
    """See `Network.infer_config`."""
    s.only("cls_token_num", 1, "so a class is several positions")
    s.only("model_type", "c2i", "so it is not conditioned on classes")
    s.only("rope_base", 10000, "so its rotary frequencies are others")
    s.only("norm_eps", 1e-5, "so its norms are others")
    s.by_shape("codebook_size", s.size("tok_embeddings.weight", 0))
    s.by_shape("width", s.size("tok_embeddings.weight", 1))
    s.by_shape("depth", count_layers(s.tensors, "layers."))
    # The last class is the null class.
    s.by_shape("num_classes", s.size("cls_embedding.embedding_table.weight", 0) - 1)
    s.by_shape("group_size", s.size(_SPECIAL, 0) + 1)
    _heads(s, rows=s.size("layers.0.attention.wqkv.weight", 0))
    _hidden(s, s.size("layers.0.feed_forward.w1.weight", 0))
    why = "as in DetailFlow-16; pass num_tokens=256 or 512 if it is of another tokenizer"
    s.told("num_tokens", int, default=128, why=why)
    s.told("causal_num", int, signed=True)  # 0 is allowed; the network checks the rest
    return s.build(GeneratorConfig)


def _heads(s: Settings, rows: int) -> None:
    """Query heads by override, configuration or published size; key/value heads by shape."""
    width, depth = s.fields["width"], s.fields["depth"]
    named = SIZES.get(str(s.published.get("gpt_model")))
    if named and (named["depth"], named["width"]) != (depth, width):
        said = f"{s.published['gpt_model']}, {named['depth']} layers of width {named['width']}"
        s.contradict("gpt_model", said, f"{depth} layers of width {width}")
    heads = s.told("num_heads", int, default=_HEADS.get((depth, width)))
    if heads is None or width % heads or (rows - width) % (2 * (width // heads)):
        raise CheckpointError(
            f"{s.source}: a generator of {depth} layers, width {width} and {heads} heads, with "
            f"{rows} rows of queries, keys and values",
            expected="num_heads=..., a divisor of the width; shapes do not tell it",
        )
    kv_heads = (rows - width) // (2 * (width // heads))
    if kv_heads < 1 or heads % kv_heads:
        s.contradict("n_head", str(heads), f"{kv_heads} key/value heads")
    s.by_shape("num_kv_heads", kv_heads)
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
    if s.published.get("ffn_dim_multiplier"):  # The multiple is then of another width.
        s.published = {k: v for k, v in s.published.items() if k != "multiple_of"}
    s.by_shape("multiple_of", multiple)


def describe(config: GeneratorConfig) -> Description:
    """See `Network.describe`.

    Raises:
      CheckpointError: the network has a flow head.
    """
    if config.head == "flow":
        raise CheckpointError(
            "a generator with a flow head has no published counterpart",
            remedy="Keep its workdir, which df.load_generator reads.",
        )
    both = published_fields(config, _NAMES) | {"cls_token_num": 1}
    block = {"depth": config.depth, "num_heads": config.num_heads, "width": config.width}
    name = next((name for name, size in SIZES.items() if size == block), None)
    usual = {"num_kv_heads": (None, config.num_heads), "multiple_of": (256,)}
    fields = {field: getattr(config, field) for field in usual}
    unlike = [f"{field}={x}" for field, x in fields.items() if x not in usual[field]]
    if name:
        notice = (
            f"the published scripts build {name} by its name, and loading fails: this one has "
            f"{', '.join(unlike)}. Build it with Transformer(ModelArgs(**config)) of config.json"
        )
        return both, {"gpt_model": name}, [notice] if unlike else []
    notice = (
        f"{config.depth} layers of width {config.width} with {config.num_heads} heads are none of "
        "the published sizes, so gpt_model is left out: the published code builds it with "
        "Transformer(ModelArgs(**config)) of config.json, not by a name"
    )
    return both, {}, [notice]


def _buffers(config: GeneratorConfig) -> dict[str, np.ndarray]:
    """In groups of one, a table of no special embeddings."""
    return {_SPECIAL: np.zeros((0, config.width), np.float32)} if config.group_size == 1 else {}


NETWORK = Network(
    name="generator",
    title="DetailFlow generator",
    recognise=any_of(("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight")),
    module=make_generator,
    example=example,
    table=TABLE,
    skipped=SKIPPED,
    infer_config=infer_config,
    from_run=task.model_config,
    describe=describe,
    names=_NAMES,
    options={
        "num_heads": (int, "attention heads"),
        "num_tokens": (int, "N, tokens of an image"),
        "causal_num": (int, "c, tokens generated one by one"),
    },
    buffers=_buffers,
    file_name=lambda config: str(config.num_tokens),
    weights="ema",
)
