"""Discriminators in their published names: frozen DINO, its heads, PatchGAN.

The tables of trained parts are over all variables of a network: `params/...`, `batch_stats/...`,
`spectral/...`; the one of DINO is over its parameters.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, conv, counters, linear, norm, to_published
from detailflow_jax.convert.network import Layout, Network, any_of, image
from detailflow_jax.convert.settings import Settings, count_layers
from detailflow_jax.models.discriminator import Dino, DinoConfig, make

_HEAD_DIM = 64  # of an attention head in every published DINO

_BLOCK, _OURS = "blocks.{}", "blocks/layers"


DINO = (
    Entry("cls_token", ("class_token",), lead=1),
    Entry("pos_embed", ("position_table",), lead=1),
    *conv("patch_embed.proj", "patch_embed"),
    *norm(f"{_BLOCK}.norm1", f"{_OURS}/norm1"),
    *linear(f"{_BLOCK}.attn.qkv", *(f"{_OURS}/attention/{part}_proj" for part in "qkv")),
    *linear(f"{_BLOCK}.attn.proj", f"{_OURS}/attention/out_proj"),
    *norm(f"{_BLOCK}.norm2", f"{_OURS}/norm2"),
    *linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}/fc1"),
    *linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}/fc2"),
)
"""`dino_deitsmall16_pretrain.pth`, and the same network in timm."""

DINO_SKIPPED = ("x_scale", "x_shift", "norm.", "head.")
"""Constants, and what comes after the last read point."""


def infer_dino(s: Settings) -> DinoConfig:
    """See `Network.infer_config`; heads have a width of 64 unless `num_heads` is an override."""
    width, length = s.size("pos_embed", 2, 3), s.size("pos_embed", 1, 3)
    patch, side = s.size("patch_embed.proj.weight", 3, 4), round((length - 1) ** 0.5)
    num_heads = s.overrides.pop("num_heads", None) or width // _HEAD_DIM
    if side**2 != length - 1 or not num_heads or width % num_heads:
        raise CheckpointError(
            f"{s.source}: {length} positions, width {width} and {num_heads} heads",
            expected="a class token and a square grid, heads that divide the width",
        )
    for name, value in (
        *(("width", width), ("num_heads", num_heads), ("patch_size", patch)),
        *(("depth", count_layers(s.tensors, "blocks.")), ("image_size", side * patch)),
    ):
        s.by_shape(name, value)
    return s.build(DinoConfig)


def _spectral_conv(name: str, path: str) -> Iterator[Entry]:
    yield Entry(f"{name}.bias", (f"params/{path}/bias",))
    yield Entry(f"{name}.weight_orig", (f"params/{path}/kernel",), permute=(2, 1, 0))
    for vector in "uv":
        yield Entry(f"{name}.weight_{vector}", (f"spectral/{path}/{vector}",))


def _batch_norm(name: str, path: str) -> Iterator[Entry]:
    yield from norm(name, f"params/{path}")
    for part in ("mean", "var"):
        yield Entry(f"{name}.running_{part}", (f"batch_stats/{path}/{part}",))


def heads(read_points: int, prefix: str = "heads.") -> tuple[Entry, ...]:
    """Returns the table of the trained heads, under `prefix`; "" where they are saved alone."""
    table: list[Entry] = []
    for i in range(read_points):
        name, path = f"{prefix}{i}", f"head_{i}"
        table += _spectral_conv(f"{name}.0.0", f"{path}/first_conv")
        table += _batch_norm(f"{name}.0.1", f"{path}/first_norm")
        table += _spectral_conv(f"{name}.1.fn.0", f"{path}/residual_conv")
        table += _batch_norm(f"{name}.1.fn.1", f"{path}/residual_norm")
        table += _spectral_conv(f"{name}.2", f"{path}/output")
    return tuple(table)


def heads_prefix(tensors: Collection[str]) -> str | None:
    """Returns the prefix under which a file keeps such heads, or None."""
    return next((p for p in ("heads.", "") if f"{p}0.0.0.weight_orig" in tensors), None)


def patchgan(num_layers: int, prefix: str = "main.") -> tuple[Entry, ...]:
    """Returns the table of PatchGAN, as pix2pix and taming-transformers name it."""
    table = list(conv(f"{prefix}0", "params/conv_0"))
    for i in range(1, num_layers + 1):
        at = 3 * i - 1  # convolution, norm and activation after a first convolution and activation
        table += conv(f"{prefix}{at}", f"params/conv_{i}", use_bias=False)
        table += _batch_norm(f"{prefix}{at + 1}", f"norm_{i}")
    return (*table, *conv(f"{prefix}{3 * num_layers + 2}", "params/output"))


def find(names: Collection[str]) -> bool:
    """Returns whether these tensors are the trained part of a discriminator."""
    return heads_prefix(names) is not None or "main.0.weight" in names


def layout(tensors: Mapping[str, Any], variables: Mapping[str, Any], source: str) -> Layout:
    """See `Network.layout`; `variables` are all those of a trained part."""
    del source
    parts = variables["params"]
    if points := sum(name.startswith("head_") for name in parts):
        prefix = heads_prefix(tensors)
        table = heads(points, "heads." if prefix is None else prefix)
    else:
        table = patchgan(sum(name.startswith("conv_") for name in parts) - 1)
    return table, (*counters(table), "dino_proxy.")


def published_state(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns all that strict loading of a trained part asks for: tensors and batch counters."""
    table, _ = layout({}, variables, "")
    zeros = {name: np.zeros((), np.int64) for name in counters(table)}
    return to_published(table, variables) | zeros


DINO_NETWORK = Network(
    name="dino",
    title="DINO vision transformer",
    recognise=any_of(("blocks.0.attn.qkv.weight",)),
    module=Dino,
    example=lambda config: (image(config.image_size),),
    table=DINO,
    skipped=DINO_SKIPPED,
    infer_config=infer_dino,
    files=("dino",),
)

NETWORK = Network(
    name="discriminator",
    title="trained discriminator",
    recognise=find,
    module=lambda config: make(config).network,
    example=lambda config: (),  # Its variables are known to the caller, who passes `params`.
    layout=layout,
    weights="discriminator",
    field="config.init_from.discriminator",
)
