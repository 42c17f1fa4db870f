"""DC-AE in diffusers' names and configuration (`AutoencoderDC`), the layout of its published files.

Shapes cannot tell its activations, heads and shortcuts, so its config.json has to be there.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, conv, counters, linear, norm
from detailflow_jax.convert.settings import Settings, published_fields
from detailflow_jax.models.dc_ae import DCAEConfig

CLASS = "AutoencoderDC"

_SIGNS = ("attn.to_q.weight", "attn.norm_out.weight", "conv2.weight")
"""Of the first block of a level, by what blocks are there."""


def recognise(names: Collection[str]) -> bool:
    """Whether these tensors are of a DC-AE: its levels' blocks have numbers only."""
    heads = ("encoder.down_blocks.", "decoder.up_blocks.")
    return any(
        name.startswith(heads) and name.split(".")[3].isdecimal() and name.endswith(_SIGNS)
        for name in names
    )


def table(params: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Returns the table of (abstract) parameters."""
    return (*_half("encoder", params["encoder"]), *_half("decoder", params["decoder"]))


def _half(part: str, params: Mapping[str, Any]) -> Iterator[Entry]:
    decoder = part == "decoder"
    levels, resample = ("up_blocks", "up") if decoder else ("down_blocks", "down")
    for end in ("conv_in", "conv_out"):  # where the first level has no blocks, they change sides
        inner = "conv" in params[end]
        yield from conv(f"{part}.{end}{'.conv' * inner}", f"{part}/{end}{'/conv' * inner}")
    for key, level in params.items():
        if not key.startswith("level_"):
            continue
        i = int(key.removeprefix("level_"))
        theirs, blocks = f"{part}.{levels}.{i}", len(level)
        # What changes the sides comes before the blocks of the decoder, after those of the encoder.
        first = int(decoder and f"up_{i}" in params)
        yield from conv(f"{theirs}.{0 if decoder else blocks}.conv", f"{part}/{resample}_{i}/conv")
        for j in range(blocks):
            yield from _block(f"{theirs}.{first + j}", f"{part}/{key}/block_{j}")
    yield from _norm(f"{part}.norm_out", f"{part}/norm_out")


def _block(name: str, path: str) -> Iterator[Entry]:
    """Either block; a network has the parameters of one of them."""
    yield from conv(f"{name}.conv1", f"{path}/conv1")
    yield from conv(f"{name}.conv2", f"{path}/conv2", use_bias=False)
    yield from _norm(f"{name}.norm", f"{path}/norm")
    attention, gated = f"{path}/attention", f"{path}/gated"
    for theirs, ours in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out", "output"),
    ):
        yield from linear(f"{name}.attn.{theirs}", f"{attention}/{ours}", use_bias=False)
    for theirs, ours in (("proj_in", "scale_in"), ("proj_out", "scale_out")):
        second = f"{name}.attn.to_qkv_multiscale.0.{theirs}"
        yield from conv(second, f"{attention}/{ours}", use_bias=False)
    yield from _norm(f"{name}.attn.norm_out", f"{attention}/norm")
    yield from conv(f"{name}.conv_out.conv_inverted", f"{gated}/inverted")
    yield from conv(f"{name}.conv_out.conv_depth", f"{gated}/depth")
    yield from conv(f"{name}.conv_out.conv_point", f"{gated}/point", use_bias=False)
    yield from _norm(f"{name}.conv_out.norm", f"{gated}/norm")


def _norm(name: str, path: str) -> Iterator[Entry]:
    """Either norm; the scale of one that is not a batch norm is a part of it."""
    yield from norm(name, path)
    yield Entry(f"{name}.weight", (f"{path}/rms/scale",))
    yield Entry(f"{name}.running_mean", (f"{path}/mean",))
    yield Entry(f"{name}.running_var", (f"{path}/var",))


def skipped(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the counters of batch norms."""
    return counters(table(params))


# ------------------------------------------------------------------------------- configurations

NAMES = {
    "image_channels": "in_channels",
    "latent_channels": "latent_channels",
    "head_dim": "attention_head_dim",
    "encoder_widths": "encoder_block_out_channels",
    "decoder_widths": "decoder_block_out_channels",
    "encoder_blocks": "encoder_layers_per_block",
    "decoder_blocks": "decoder_layers_per_block",
    "decoder_norms": "decoder_norm_types",
    "decoder_activations": "decoder_act_fns",
    "encoder_shortcut": "encoder_out_shortcut",
    "decoder_shortcut": "decoder_in_shortcut",
    "output_activation": "decoder_conv_act_fn",
    "scale_factor": "scaling_factor",
}
_USUAL = {
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "decoder_conv_act_fn": "relu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
}
"""What diffusers takes for a field that config.json lacks."""
_SIDES = [128, 256, 512, 512, 1024, 1024]
_KERNELS = [[], [], [], [5], [5], [5]]
_RES, _VIT = "ResBlock", "EfficientViTBlock"


def infer_config(s: Settings) -> DCAEConfig:
    """See `Network.infer_config`."""
    p = {name: x for name, x in s.published.items() if x is not None}
    if "_class_name" not in p:
        raise CheckpointError(
            f"{s.source}: a DC-AE without its configuration",
            expected="the config.json of diffusers beside it: shapes cannot tell its activations",
        )
    s.only("_class_name", CLASS, f"its tensors are named as those of an {CLASS}", "of diffusers")
    s.check("image_channels", s.size(_first(s, "encoder.conv_in"), 1, 4))
    s.check("latent_channels", s.size("encoder.conv_out.weight", 0, 4))
    p = _USUAL | {"latent_channels": 32, "in_channels": 3} | p
    fields: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        widths = p.setdefault(f"{part}_block_out_channels", _SIDES)
        for field in (f"{part}_block_out_channels", f"{part}_layers_per_block"):
            if not (isinstance(p[field], list) and all(type(x) is int for x in p[field])):
                raise _unusable(s, field, p[field], "a list of whole numbers, one per level")
        types = _each(s, f"{part}_block_types", _RES, widths)
        if unknown := {*types} - {_RES, _VIT}:
            raise CheckpointError(
                f"{s.source}: {part}_block_types has {sorted(map(str, unknown))[0]!r:.99}",
                expected=f"{_RES} or {_VIT}",
                remedy="Such an autoencoder is not supported here.",
            )
        attending = tuple(i for i, kind in enumerate(types) if kind == _VIT)
        fields[f"{part}_attention"] = attending
        fields[f"{part}_kernels"] = _kernels(s, part, p, attending, len(widths))
    for name, usual in (("decoder_norm_types", "rms_norm"), ("decoder_act_fns", "silu")):
        p[name] = _each(s, name, usual, p["decoder_block_out_channels"])
    told = ("head_dim", "scale_factor")
    fields |= {ours: p[theirs] for ours, theirs in NAMES.items() if ours not in told}
    fields["unshuffle"] = p["downsample_block_type"] == "pixel_unshuffle"
    fields["shuffle"] = p["upsample_block_type"] != "interpolate"
    s.fields |= {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    s.told("head_dim", int, default=32)
    s.told("scale_factor", float, default=1.0, several=True)
    s.told("shift_factor", float, default=0.0, signed=True, several=True)
    return s.build(DCAEConfig)


def _first(s: Settings, name: str) -> str:
    """The tensor of a first convolution, which may be one that halves the sides."""
    return f"{name}.weight" if f"{name}.weight" in s.tensors else f"{name}.conv.weight"


def _each(s: Settings, field: str, usual: str, levels: Collection[Any]) -> list[str]:
    """One text per level, of a field that has one for all or a list of them."""
    value = s.published.get(field) or usual
    texts = [value] * len(levels) if isinstance(value, str) else value
    if not isinstance(texts, list) or any(type(x) is not str for x in texts):
        raise _unusable(s, field, value, "a text, or one per level")
    return texts


def _unusable(s: Settings, field: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{s.source}: its configuration says {field}={value!r:.99}", expected=expected
    )


def _kernels(
    s: Settings, part: str, published: Mapping[str, Any], attending: Collection[int], levels: int
) -> tuple[int, ...]:
    """The side of each level's second set; 0 where there is none, or no attention."""
    field = f"{part}_qkv_multiscales"
    given = published.get(field, _KERNELS)
    lists = isinstance(given, list) and len(given) == levels and all(type(x) is list for x in given)
    if not lists or any(len(x) > 1 or any(type(n) is not int for n in x) for x in given):
        raise _unusable(s, field, given, f"{levels} lists of at most one number, as supported here")
    return tuple(x[0] if x and i in attending else 0 for i, x in enumerate(given))


def describe(config: DCAEConfig) -> dict[str, Any]:
    """Returns the config.json of diffusers' `AutoencoderDC`.

    Raises:
      CheckpointError: it has no field for a shift, or for one scale per channel.
    """
    if config.shift_factor != 0 or isinstance(config.scale_factor, tuple):
        raise CheckpointError(
            f"shift_factor={config.shift_factor}, scale_factor={config.scale_factor}",
            expected=f"no shift and one scale: an {CLASS} has a field for nothing else",
        )
    fields: dict[str, Any] = {"_class_name": CLASS, **published_fields(config, NAMES)}
    for part in ("encoder", "decoder"):
        attention = getattr(config, f"{part}_attention")
        levels = range(config.levels)
        fields[f"{part}_block_types"] = [_VIT if i in attention else _RES for i in levels]
        kernels = getattr(config, f"{part}_kernels")
        fields[f"{part}_qkv_multiscales"] = [[kernel] if kernel else [] for kernel in kernels]
    fields["downsample_block_type"] = "pixel_unshuffle" if config.unshuffle else "Conv"
    fields["upsample_block_type"] = "pixel_shuffle" if config.shuffle else "interpolate"
    return fields
