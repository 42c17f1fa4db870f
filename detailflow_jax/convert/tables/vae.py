"""Autoencoders in the names of the LDM family and of diffusers, and in their configurations.

A file of a KL autoencoder is read in whichever names it has. `save_pytorch` writes the former,
`save_diffusers` the latter. DC-AE, whose table is in `dc_ae`, has the latter only.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, conv, norm
from detailflow_jax.convert.network import Description, Diffusers, Layout, Network, any_of
from detailflow_jax.convert.settings import Settings, count_layers, published_fields, unlike
from detailflow_jax.convert.tables import dc_ae
from detailflow_jax.models.dc_ae import DCAE, DCAEConfig
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.tasks import vae as task

MOST_LEVELS, MOST_BLOCKS = 8, 8
"""The table names this many; those that a network lacks have no tensors."""


@dataclasses.dataclass(frozen=True)
class Names:
    """How a family of files names the parts of either half; `{}` is the number of a part.

    Attributes:
      levels: of the encoder and of the decoder.
      block, shortcut: a residual block of a level, and its 1x1 convolution.
      attention: the attention after a residual block.
      resample: the convolution between levels, of the encoder and of the decoder.
      middle: residual block, attention, residual block.
      norm_out: the last norm.
      parts: norm, query, key, value and output of an attention.
      linear: whether the latter four are linear layers, not 1x1 convolutions.
      reverse: whether the decoder's levels are numbered from the deepest one.
    """

    levels: tuple[str, str]
    block: str
    shortcut: str
    attention: str
    resample: tuple[str, str]
    middle: tuple[str, str, str]
    norm_out: str
    parts: tuple[str, str, str, str, str]
    linear: bool
    reverse: bool

    def level(self, part: str, index: int, count: int) -> str:
        """Name of level `index` of `count` of "encoder" or "decoder"."""
        decoder = part == "decoder"
        number = count - 1 - index if decoder and self.reverse else index
        return f"{part}.{self.levels[decoder]}.{number}"


LDM = Names(
    levels=("down", "up"),
    block="block.{}",
    shortcut="nin_shortcut",
    attention="attn.{}",
    resample=("downsample.conv", "upsample.conv"),
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    parts=("norm", "q", "k", "v", "proj_out"),
    linear=False,
    reverse=False,
)
DIFFUSERS = Names(
    levels=("down_blocks", "up_blocks"),
    block="resnets.{}",
    shortcut="conv_shortcut",
    attention="attentions.{}",
    resample=("downsamplers.0.conv", "upsamplers.0.conv"),
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    parts=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    linear=True,
    reverse=True,
)
OLD_DIFFUSERS = dataclasses.replace(
    DIFFUSERS, parts=("group_norm", "query", "key", "value", "proj_attn")
)
"""Before diffusers 0.17, as in many files on the hub."""


def names_of(tensors: Collection[str]) -> Names:
    """Returns the names that a file uses."""
    if not any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in tensors):
        return LDM
    old = any(name.endswith("mid_block.attentions.0.query.weight") for name in tensors)
    return OLD_DIFFUSERS if old else DIFFUSERS


def table(names: Names, levels: int = MOST_LEVELS) -> tuple[Entry, ...]:
    """Returns the table of an autoencoder of `levels` levels."""
    return (
        *_half("encoder", names, levels),
        *_half("decoder", names, levels),
        *conv("quant_conv", "quant_conv"),
        *conv("post_quant_conv", "post_quant_conv"),
    )


def _half(part: str, names: Names, levels: int) -> Iterator[Entry]:
    """The encoder or the decoder."""
    decoder = part == "decoder"
    yield from conv(f"{part}.conv_in", f"{part}/conv_in")
    for i in range(levels):
        theirs, ours = names.level(part, i, levels), f"{part}/level_{i}"
        for j in range(MOST_BLOCKS):
            block = f"{theirs}.{names.block.format(j)}"
            yield from _res_block(block, f"{ours}/block_{j}", names)
            attention = f"{theirs}.{names.attention.format(j)}"
            yield from _attention(attention, f"{ours}/attention_{j}", names)
        resample = "upsample" if decoder else "downsample"
        yield from conv(f"{theirs}.{names.resample[decoder]}", f"{ours}/{resample}")
    first, attention, second = names.middle
    yield from _res_block(f"{part}.{first}", f"{part}/middle/block_0", names)
    yield from _attention(f"{part}.{attention}", f"{part}/middle/attention", names)
    yield from _res_block(f"{part}.{second}", f"{part}/middle/block_1", names)
    yield from norm(f"{part}.{names.norm_out}", f"{part}/norm_out")
    yield from conv(f"{part}.conv_out", f"{part}/conv_out")


def _res_block(name: str, path: str, names: Names) -> Iterator[Entry]:
    for i in (1, 2):
        yield from norm(f"{name}.norm{i}", f"{path}/norm{i}")
        yield from conv(f"{name}.conv{i}", f"{path}/conv{i}")
    yield from conv(f"{name}.{names.shortcut}", f"{path}/shortcut")


def _attention(name: str, path: str, names: Names) -> Iterator[Entry]:
    yield from norm(f"{name}.{names.parts[0]}", f"{path}/norm")
    for theirs, ours in zip(names.parts[1:], ("query", "key", "value", "output"), strict=True):
        if names.linear:
            kernel = (f"{path}/{ours}/kernel",)
            yield Entry(f"{name}.{theirs}.weight", kernel, transpose=True, extra=2)
            yield Entry(f"{name}.{theirs}.bias", (f"{path}/{ours}/bias",))
        else:
            yield from conv(f"{name}.{theirs}", f"{path}/{ours}")


TABLE = table(LDM)

_SIGNS = (
    "encoder.down.0.block.0.norm1.weight",
    "decoder.up.0.block.0.norm1.weight",
    "encoder.down_blocks.0.resnets.0.norm1.weight",
    "decoder.up_blocks.0.resnets.0.norm1.weight",
)

SKIPPED = ("loss.",)
"""A training checkpoint's discriminator and perceptual network."""


def layout(tensors: Mapping[str, Any], params: Mapping[str, Any], source: str) -> Layout:
    """See `Network.layout`."""
    del source
    if dc_ae.recognise(tensors):
        return dc_ae.table(params), dc_ae.skipped(params)
    names = names_of(tensors)
    levels = sum(name.startswith("level_") for name in params["encoder"])
    return (table(names, levels) if names.reverse else TABLE), SKIPPED


# ------------------------------------------------------------------------------- configurations

_NAMES = {
    "channels": "ch",
    "multipliers": "ch_mult",
    "res_blocks": "num_res_blocks",
    "image_channels": "in_channels",
    "latent_channels": "z_channels",
    "scale_factor": ("scale_factor", "scaling_factor"),
}
_DIFFUSERS_NAMES = {
    "res_blocks": "layers_per_block",
    "image_channels": "in_channels",
    "latent_channels": "latent_channels",
    "quant_conv": "use_quant_conv",
    "post_quant_conv": "use_post_quant_conv",
    "middle_attention": "mid_block_add_attention",
    "scale_factor": "scaling_factor",
    "shift_factor": "shift_factor",
    "norm_groups": "norm_num_groups",
}
_BLOCK_TYPES = {
    "encoder": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "decoder": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
"""Of diffusers, without and with attention."""


def infer_config(s: Settings) -> VAEConfig | DCAEConfig:
    """See `Network.infer_config`."""
    if dc_ae.recognise(s.tensors):
        return dc_ae.infer_config(dataclasses.replace(s, names=dc_ae.NAMES))
    names = names_of(s.tensors)
    if names.reverse:
        s = dataclasses.replace(s, names=_DIFFUSERS_NAMES)
        kind = "its tensors are named as those of an AutoencoderKL"
        s.only("_class_name", "AutoencoderKL", kind, "of diffusers")
        s.only("act_fn", "silu", "so its activations are others", "as in every published one")
        s.only("out_channels", s.published.get("in_channels"), "unlike in_channels", "as encoded")
    s.by_shape("channels", s.size("encoder.conv_in.weight", 0, 4))
    s.by_shape("image_channels", s.size("encoder.conv_in.weight", 1, 4))
    s.by_shape("latent_channels", s.size("decoder.conv_in.weight", 1, 4))
    for name in ("quant_conv", "post_quant_conv"):
        s.by_shape(name, f"{name}.weight" in s.tensors)
    _levels(s, names)
    _scaling(s)
    s.told("norm_groups", int, default=32)
    return s.build(VAEConfig)


def _levels(s: Settings, names: Names) -> None:
    """Settles the levels: their number, widths, blocks and attention."""
    count = _count(s, f"encoder.{names.levels[0]}.", MOST_LEVELS)
    first = names.block.format(0)
    levels = [names.level("encoder", i, count) for i in range(count)]
    widths = [s.size(f"{level}.{first}.conv1.weight", 0, 4) for level in levels]
    channels = s.fields["channels"]
    if names.reverse and s.published.get("block_out_channels", widths) != widths:
        said = f"{s.published['block_out_channels']!r:.99}"
        s.contradict("block_out_channels", said, widths)
    if odd := [width for width in widths if width % channels]:
        raise CheckpointError(
            f"{s.source}: a level is {odd[0]} channels wide",
            expected=f"multiples of the first convolution's {channels}",
            remedy="Such an autoencoder is not supported here.",
        )
    s.by_shape("multipliers", tuple(width // channels for width in widths))
    blocks = names.block.partition("{")[0]
    s.by_shape("res_blocks", _count(s, f"{levels[0]}.{blocks}", MOST_BLOCKS - 1))
    query = f"{names.parts[1]}.weight"
    s.by_shape("middle_attention", f"encoder.{names.middle[1]}.{query}" in s.tensors)
    for part in ("encoder", "decoder"):
        at = [f"{names.level(part, i, count)}.{names.attention.format(0)}" for i in range(count)]
        attending = tuple(i for i, name in enumerate(at) if f"{name}.{query}" in s.tensors)
        s.by_shape(f"{part}_attention", attending)
        types = _block_types(part, attending, count)
        field = "down_block_types" if part == "encoder" else "up_block_types"
        if names.reverse and s.published.get(field, types) != types:
            s.contradict(field, f"{s.published[field]!r:.99}", types)


def _count(s: Settings, prefix: str, most: int) -> int:
    """Returns how many levels or blocks there are, of which the table names a few only."""
    count = count_layers(s.tensors, prefix)
    if not 0 < count <= most:
        raise CheckpointError(
            f"{s.source}: its tensors are numbered {prefix}0 to {prefix}{count - 1}",
            expected=f"1 to {most} of them",
            remedy="Such an autoencoder is not supported here.",
        )
    return count


def _block_types(part: str, attending: Collection[int], levels: int) -> list[str]:
    """The names that diffusers has for the levels of a half, in its order."""
    types = [_BLOCK_TYPES[part][i in attending] for i in range(levels)]
    return types if part == "encoder" else types[::-1]


def _scaling(s: Settings) -> None:
    """Settles scale and shift: by override, configuration, or the usual ones of these latents."""
    channels, levels = s.fields["latent_channels"], len(s.fields["multipliers"])
    usual, needed = None, "1 / standard deviation of the latents"
    why = f"the usual one of {channels} latent channels; pass scale_factor= if it is another"
    if channels == 4:
        usual, why = 0.18215, f"{why} (that of SDXL is 0.13025)"
    elif (channels, levels) == (16, 5):
        usual = 0.2325
    elif channels == 16:
        needed += " (FLUX: 0.3611 with shift_factor=0.1159; SD3: 1.5305 with 0.0609)"
    mean, std = (s.published.get(f"latents_{name}") for name in ("mean", "std"))
    if (mean is None) != (std is None):
        raise CheckpointError(
            f"{s.source}: its configuration has only one of latents_mean and latents_std",
            expected="both or neither",
        )
    # A field that is there and null is one that is not there.
    published = {name: x for name, x in s.published.items() if x is not None}
    if mean is not None:
        published |= _by_channel(s, mean, std)
    s = dataclasses.replace(s, published=published)
    s.told("scale_factor", float, default=usual, why=why, needed=needed, several=True)
    s.told("shift_factor", float, default=0.0, signed=True, several=True)


def _by_channel(s: Settings, mean: Any, std: Any) -> dict[str, Any]:
    """Returns what diffusers' latents_mean and latents_std are as scaling_factor, shift_factor."""
    count = s.fields["latent_channels"]
    factor, shift = s.published.get("scaling_factor") or 1, s.published.get("shift_factor") or 0
    for name, value in (("scaling_factor", factor), ("shift_factor", shift)):
        if not isinstance(value, int | float):
            raise CheckpointError(
                f"{s.source}: its configuration says {name}={value!r:.99}",
                expected="one number, beside latents_mean and latents_std",
            )
    for name, value in (("latents_mean", mean), ("latents_std", std)):
        numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
        if not numbers or len(value) != count or (value is std and min(value) <= 0):
            raise CheckpointError(
                f"{s.source}: its configuration says {name}={value!r:.99}",
                expected=f"{count} numbers, one per latent channel"
                + (", above 0" if value is std else ""),
            )
    return {"scaling_factor": [factor / x for x in std], "shift_factor": [shift + x for x in mean]}


def describe(config: VAEConfig | DCAEConfig) -> Description:
    """See `Network.describe`."""
    if isinstance(config, DCAEConfig):
        raise CheckpointError(
            "a DC-AE is published in the layout of diffusers alone",
            remedy="Write that: df.save_diffusers, or convert --to diffusers.",
        )
    both = published_fields(config, _NAMES) | {"embed_dim": config.latent_channels}
    # What no published autoencoder of this family needs to tell.
    extra = {"norm_groups": config.norm_groups, "shift_factor": config.shift_factor}
    notices = []
    usual = dataclasses.asdict(VAEConfig(dtype=config.dtype))
    if other := unlike(config, usual):
        notices.append(
            "the published autoencoder code builds KL-16 alone, and loads without strictness: with "
            f"this file loading fails, or its results are wrong, because of {', '.join(other)}"
        )
    return both, extra, notices


def diffusers(config: VAEConfig | DCAEConfig, params: Mapping[str, Any]) -> Diffusers:
    """See `Network.diffusers`: an `AutoencoderKL` or an `AutoencoderDC`."""
    if isinstance(config, DCAEConfig):
        return dc_ae.table(params), dc_ae.describe(config)
    levels = len(config.multipliers)
    fields = {
        "_class_name": "AutoencoderKL",
        "out_channels": config.image_channels,
        "block_out_channels": [config.channels * m for m in config.multipliers],
        "down_block_types": _block_types("encoder", config.encoder_attention or (), levels),
        "up_block_types": _block_types("decoder", config.decoder_attention or (), levels),
        "act_fn": "silu",
        **published_fields(config, _DIFFUSERS_NAMES),
    }
    scale, shift = config.scale_factor, config.shift_factor
    fields["shift_factor"] = shift or None
    if isinstance(scale, tuple) or isinstance(shift, tuple):
        scales, shifts = (
            x if isinstance(x, tuple) else (x,) * config.latent_channels for x in (scale, shift)
        )
        fields |= {"scaling_factor": 1.0, "shift_factor": None}
        fields |= {"latents_mean": list(shifts), "latents_std": [1 / x for x in scales]}
    return table(DIFFUSERS, levels), fields


NETWORK = Network(
    name="vae",
    title="latent autoencoder",
    recognise=lambda names: any_of(_SIGNS)(names) or dc_ae.recognise(names),
    module=lambda config: (DCAE if isinstance(config, DCAEConfig) else VAE)(config),
    example=lambda c: (jnp.zeros((1, c.stride, c.stride, c.image_channels)),),
    table=TABLE,
    skipped=SKIPPED,
    layout=layout,
    infer_config=infer_config,
    from_run=lambda model: task.autoencoder_config(model.to_dict(), "config.model"),
    describe=describe,
    diffusers=diffusers,
    names=_NAMES,
    options={
        "scale_factor": (float, "of latents, 1 / their standard deviation"),
        "shift_factor": (float, "of latents, subtracted before they are scaled"),
    },
    encoder=("encoder", "quant_conv"),
    file_name=lambda config: f"kl{config.stride}",
    files=("kl16",),
)
