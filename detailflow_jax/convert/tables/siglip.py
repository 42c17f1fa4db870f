"""SigLIP2 vision model in Hugging Face names."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, depth, linear, norm
from detailflow_jax.convert.network import Layout, Network, image
from detailflow_jax.convert.settings import Settings, count_layers
from detailflow_jax.models.siglip import VisionTransformer, ViTConfig

HEADS = {1152: 16, 768: 12}
"""Heads by width, in SigLIP2-so400m and in the trunks of the published tokenizers."""


def trunk(name: str, path: str, *, patches: bool = True) -> tuple[Entry, ...]:
    """Returns the table of a vision transformer under published `name` and parameter `path`.

    Both may be empty. `patches=False`: without the patch embedding.
    """
    published, ours = _under(name), _under(path, "/")
    embedding = linear(f"{published}embeddings.patch_embedding", f"{ours}patch_embed")
    layer, block = f"{published}encoder.layers.{{}}", f"{ours}blocks/layers"
    return (
        *(embedding if patches else ()),
        Entry(f"{published}embeddings.position_embedding.weight", (f"{ours}position_table",)),
        *linear(f"{layer}.self_attn.k_proj", f"{block}/attention/k_proj"),
        *linear(f"{layer}.self_attn.v_proj", f"{block}/attention/v_proj"),
        *linear(f"{layer}.self_attn.q_proj", f"{block}/attention/q_proj"),
        *linear(f"{layer}.self_attn.out_proj", f"{block}/attention/out_proj"),
        *norm(f"{layer}.layer_norm1", f"{block}/norm1"),
        *linear(f"{layer}.mlp.fc1", f"{block}/fc1"),
        *linear(f"{layer}.mlp.fc2", f"{block}/fc2"),
        *norm(f"{layer}.layer_norm2", f"{block}/norm2"),
        *norm(f"{published}post_layernorm", f"{ours}final_norm"),
    )


def _under(name: str, separator: str = ".") -> str:
    return f"{name}{separator}" if name else ""


PREFIXES = ("vision_model", "", "repa_model.visual_model")
"""Where a file may keep the model: that of a `Siglip2Model`, of a `Siglip2VisionModel` alone
(newer versions of transformers), of a training checkpoint of the tokenizer with its teacher."""

SIGN = "embeddings.patch_embedding.weight"
"""The name by which such a checkpoint is known, under one of the prefixes."""


def find(tensors: Collection[str]) -> str | None:
    """Returns the prefix under which a file keeps a SigLIP2 vision model, or None."""
    return next((p for p in PREFIXES if _under(p) + SIGN in tensors), None)


def layout(tensors: Mapping[str, Any], params: Mapping[str, Any], source: str) -> Layout:
    """See `Network.layout`. It leaves out the pooling head, layers beyond those of `params`, and
    everything outside of the vision model.
    """
    del source
    prefix = find(tensors) or ""
    name, table = _under(prefix), trunk(prefix, "")
    later = range(depth(table, params), count_layers(tensors, f"{name}encoder.layers."))
    layers = (f"{name}encoder.layers.{i}." for i in later)
    around = (label for label in tensors if not label.startswith(name))
    return table, (f"{name}head.", *layers, *around)


def infer_config(s: Settings) -> ViTConfig:
    """See `Network.infer_config`."""
    prefix, heads = find(s.tensors) or "", s.overrides.pop("num_heads", None)
    pixels = s.size(_under(prefix) + SIGN, 1)
    found = infer_trunk(s, prefix, heads, override="num_heads", pixels=pixels)
    for name, value in dataclasses.asdict(found).items():
        s.by_shape(name, value)
    return s.build(ViTConfig)


def infer_trunk(
    s: Settings, name: str, num_heads: int | None, *, override: str, pixels: int
) -> ViTConfig:
    """Returns the sizes of the vision transformer under published `name`.

    Args:
      s: of the whole file.
      name: what its tensors' names begin with.
      num_heads: None takes what is usual for the width.
      override: what the number of heads is called where it can be given.
      pixels: numbers of a patch.

    Raises:
      CheckpointError: a tensor is missing, or the heads are not known or do not divide the width.
    """
    table = f"{_under(name)}embeddings.position_embedding.weight"
    layers = f"{_under(name)}encoder.layers."
    rows, width = s.size(table, 0), s.size(table, 1)
    num_heads = num_heads or HEADS.get(width)
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise CheckpointError(
            f"{s.source}: {name} has width {width} and {num_heads} heads",
            expected=f"{override}=..., a divisor of the width; shapes do not tell it",
        )
    return ViTConfig(
        width=width,
        depth=count_layers(s.tensors, layers),
        num_heads=num_heads,
        mlp_dim=s.size(f"{layers}0.mlp.fc1.weight", 0),
        patch_size=_side(pixels, 3, f"{s.source}: the patches of {name}"),
        table_side=_side(rows, 1, f"{s.source}: {table!r}"),
    )


def _side(size: int, channels: int, where: str) -> int:
    side = math.isqrt(size // channels)
    if side < 1 or channels * side * side != size:
        raise CheckpointError(
            f"{where}: {size} numbers", expected=f"{channels} x side x side of a square"
        )
    return side


NETWORK = Network(
    name="siglip2",
    title="SigLIP2 vision model",
    recognise=lambda names: find(names) is not None,
    module=VisionTransformer,
    example=lambda config: (image(config.patch_size),),
    layout=layout,
    infer_config=infer_config,
    files=("siglip2",),
)
