"""The KL autoencoder in the names of the LDM family and in its published configuration."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, conv, norm
from detailflow_jax.convert.network import Description, Network, any_of
from detailflow_jax.convert.settings import Settings, count_layers, published_fields, unlike
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.tasks import vae as task

MOST_LEVELS, MOST_BLOCKS = 8, 8
"""The table names this many; those that a network lacks have no tensors."""


def _res_block(name: str, path: str) -> Iterator[Entry]:
    for i in (1, 2):
        yield from norm(f"{name}.norm{i}", f"{path}/norm{i}")
        yield from conv(f"{name}.conv{i}", f"{path}/conv{i}")
    yield from conv(f"{name}.nin_shortcut", f"{path}/shortcut")


def _attention(name: str, path: str) -> Iterator[Entry]:
    yield from norm(f"{name}.norm", f"{path}/norm")
    parts = {"q": "query", "k": "key", "v": "value", "proj_out": "output"}
    for theirs, ours in parts.items():
        yield from conv(f"{name}.{theirs}", f"{path}/{ours}")


def _half(part: str, level: str, resample: str) -> Iterator[Entry]:
    """The encoder (levels `down`, `downsample`) or the decoder (`up`, `upsample`)."""
    yield from conv(f"{part}.conv_in", f"{part}/conv_in")
    for i in range(MOST_LEVELS):
        theirs, ours = f"{part}.{level}.{i}", f"{part}/level_{i}"
        for j in range(MOST_BLOCKS):
            yield from _res_block(f"{theirs}.block.{j}", f"{ours}/block_{j}")
            yield from _attention(f"{theirs}.attn.{j}", f"{ours}/attention_{j}")
        yield from conv(f"{theirs}.{resample}.conv", f"{ours}/{resample}")
    yield from _res_block(f"{part}.mid.block_1", f"{part}/middle/block_0")
    yield from _attention(f"{part}.mid.attn_1", f"{part}/middle/attention")
    yield from _res_block(f"{part}.mid.block_2", f"{part}/middle/block_1")
    yield from norm(f"{part}.norm_out", f"{part}/norm_out")
    yield from conv(f"{part}.conv_out", f"{part}/conv_out")


TABLE = (
    *_half("encoder", "down", "downsample"),
    *_half("decoder", "up", "upsample"),
    *conv("quant_conv", "quant_conv"),
    *conv("post_quant_conv", "post_quant_conv"),
)

_NAMES = {
    "channels": "ch",
    "multipliers": "ch_mult",
    "res_blocks": "num_res_blocks",
    "image_channels": "in_channels",
    "latent_channels": "z_channels",
    "scale_factor": ("scale_factor", "scaling_factor"),
}
_SCALES = {16: 0.2325, 4: 0.18215}
"""By latent channels: KL-16, and the autoencoder of Stable Diffusion."""


def infer_config(s: Settings) -> VAEConfig:
    """See `Network.infer_config`."""
    s.by_shape("channels", s.size("encoder.conv_in.weight", 0, 4))
    s.by_shape("image_channels", s.size("encoder.conv_in.weight", 1, 4))
    s.by_shape("latent_channels", s.size("decoder.conv_in.weight", 1, 4))
    s.by_shape("quant_conv", "quant_conv.weight" in s.tensors)
    levels = _count(s, "encoder.down.", MOST_LEVELS)
    widths = [s.size(f"encoder.down.{i}.block.0.conv1.weight", 0, 4) for i in range(levels)]
    multipliers = tuple(width // s.fields["channels"] for width in widths)
    s.by_shape("multipliers", multipliers)
    blocks = _count(s, "encoder.down.0.block.", MOST_BLOCKS - 1)
    s.by_shape("res_blocks", blocks)
    for part, level in (("encoder", "down"), ("decoder", "up")):
        attending = (i for i in range(levels) if f"{part}.{level}.{i}.attn.0.q.weight" in s.tensors)
        s.by_shape(f"{part}_attention", tuple(attending))
    usual = _SCALES.get(s.fields["latent_channels"])
    why = f"the usual one of {s.fields['latent_channels']} latent channels; pass scale_factor="
    needed = "1 / standard deviation of the latents"
    s.told("scale_factor", float, default=usual, why=why, needed=needed)
    s.told("shift_factor", float, default=0.0, signed=True)
    s.told("norm_groups", int, default=32)
    return s.build(VAEConfig)


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


def describe(config: VAEConfig) -> Description:
    """See `Network.describe`."""
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


NETWORK = Network(
    name="vae",
    title="KL autoencoder",
    recognise=any_of(("encoder.down.0.block.0.norm1.weight", "decoder.up.0.block.0.norm1.weight")),
    module=VAE,
    example=lambda c: (jnp.zeros((1, c.stride, c.stride, c.image_channels)),),
    table=TABLE,
    skipped=("loss.",),  # a training checkpoint's discriminator and perceptual network
    infer_config=infer_config,
    from_run=task.model_config,
    describe=describe,
    names=_NAMES,
    options={
        "scale_factor": (float, "of latents, 1 / their standard deviation"),
        "shift_factor": (float, "of latents, subtracted before they are scaled"),
    },
    encoder=("encoder", "quant_conv"),
    file_name=lambda config: f"kl{config.stride}",
    files=("kl16",),
)
