"""What a configuration leaves out, taken from the data and the autoencoder that it names.

The manifest of codes or latents knows the classes, the vocabulary and the shapes of the data. An
autoencoder knows its own sizes. A field of the configuration that is None takes their value; a
field that is set is checked against it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from detailflow_jax import data
from detailflow_jax.convert.load import is_workdir, load
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime.errors import ConfigError

VAE_FIELDS = tuple(x.name for x in dataclasses.fields(VAEConfig) if x.name != "dtype")
NOT_IN_FILES = ("scale_factor", "shift_factor", "norm_groups")
"""Fields of an autoencoder that the tensors of a published file cannot tell."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A value of a field of the configuration, and where it comes from.

    Attributes:
      field: full name below `config`.
      value: never None.
      origin: for messages.
    """

    field: str
    value: Any
    origin: str


def complete(config: ConfigDict) -> ConfigDict:
    """The configuration with what it leaves out.

    Raises:
      ConfigError: a field contradicts the data or the autoencoder, or they contradict each other.
        The text has both values and where they come from.
      NotFoundError, CheckpointError: the data or the autoencoder are not there.
    """
    make = {"generator": _of_generator, "flowar": _of_flowar}.get(config.get("task"))
    if make is None:
        return config
    defaults = getattr(config, "_defaults", None)
    config = config.copy_and_resolve_references()
    known: dict[str, Fact] = {}
    filled = {}
    with config.unlocked():
        for fact in make(config):
            _settle(config, fact, known)
            filled[fact.field] = list(fact.value) if isinstance(fact.value, tuple) else fact.value
    if defaults is not None:  # Where the file has no default, that is what the data know.
        of_file = {name: x for name, x in defaults.items() if x is not None}
        object.__setattr__(config, "_defaults", defaults | filled | of_file)
    return config


def _settle(config: ConfigDict, fact: Fact, known: dict[str, Fact]) -> None:
    """Fills the field in, or checks it."""
    *groups, name = fact.field.split(".")
    section = config
    for group in groups:
        section = section[group]
    given = section.get(name)
    if given is None:
        section[name], known[fact.field] = fact.value, fact
    elif fact.field == "model.num_classes" and given > fact.value:
        return  # Published weights for 1,000 classes may be trained on with images of ten.
    elif _plain(given) != _plain(fact.value):
        before = known.get(fact.field)
        where = f"of {before.origin}" if before else "in the configuration"
        remedy = (
            "use data and an autoencoder that belong together"
            if before
            else f"set --config.{fact.field}={fact.value}, or train on what has {given}"
        )
        raise ConfigError(
            f"config.{fact.field} is {given} {where}, but {fact.value} of {fact.origin}: {remedy}"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------ the generator


def _of_generator(config: ConfigDict) -> Iterator[Fact]:
    kind, _, folder = config.data.source.partition(":")
    if kind != "codes":
        raise ConfigError(
            f"config.data.source={config.data.source!r}: a generator trains on codes:DIR, which "
            "`detailflow extract --tokenizer` writes"
        )
    manifest = data.CodeSource.read_manifest(folder)
    origin = f"the codes in {folder}"
    for name in ("num_classes", "codebook_size", "num_tokens", "group_size"):
        yield Fact(f"model.{name}", manifest[name], origin)
    # None stands for one group.
    one_group = manifest["causal_num"] == manifest["group_size"]
    if not (one_group and config.model.get("causal_num") is None):
        yield Fact("model.causal_num", manifest["causal_num"], origin)


# ------------------------------------------------------------------------------------------- FlowAR


def _of_flowar(config: ConfigDict) -> Iterator[Fact]:
    kind, _, folder = config.data.source.partition(":")
    scaling = {}
    if kind == "latents":
        manifest = data.LatentSource.read_manifest(folder)
        side, _, channels = manifest["latent_shape"]
        origin = f"the latents in {folder}"
        scaling = {name: manifest[name] for name in ("scale_factor", "shift_factor")}
        yield Fact("model.num_classes", manifest["num_classes"], origin)
        yield from _of_latents(config, side, channels, origin)
    else:
        source = data.make_source(
            config.data.source, config.data.get("split"), config.data.get("data_dir")
        )
        yield Fact("model.num_classes", source.num_classes, f"the images of {source.name}")
    vae = config.get("vae") or {}
    if vae.get("path"):
        found, origin = _autoencoder(vae, scaling), f"the autoencoder {vae.path}"
        for name in VAE_FIELDS:
            # A field that the configuration does not have is added only if it is needed.
            if name in vae or _plain(getattr(found, name)) != _plain(_usual(found, name)):
                yield Fact(f"vae.{name}", getattr(found, name), origin)
    elif kind != "latents" and vae.get("random"):
        fields = {name: vae[name] for name in VAE_FIELDS if vae.get(name) is not None}
        found, origin = VAEConfig(**fields), "the random autoencoder of config.vae"
    else:
        return
    if kind != "latents":
        side = config.data.image_size // found.stride
        origin = f"{origin} at config.data.image_size={config.data.image_size}"
        yield from _of_latents(config, side, found.latent_channels, origin)


def _of_latents(config: ConfigDict, side: int, channels: int, origin: str) -> Iterator[Fact]:
    origin = f"{origin} ({side} x {side} x {channels})"
    yield Fact("model.channels", channels, origin)
    scales = config.model.get("scales")
    fitting = scales is not None and tuple(scales)[-1:] == (side,)
    yield Fact("model.scales", tuple(scales) if fitting else doubling(side), origin)


def doubling(side: int) -> tuple[int, ...]:
    """The usual scale schedule of a latent: 1, 2, 4, ... below its side, then the side."""
    return (*(2**i for i in range(side.bit_length()) if 2**i < side), side)


def _autoencoder(fields: ConfigDict, scaling: dict[str, float]) -> VAEConfig:
    """The configuration of the autoencoder at `fields.path`."""
    overrides = {}
    if not is_workdir(fields.path):
        given = {name: fields.get(name) for name in NOT_IN_FILES}
        overrides = scaling | {name: value for name, value in given.items() if value is not None}
    return load("vae", fields.path, overrides=overrides).config


def _usual(found: VAEConfig, name: str) -> Any:
    """The value of a field of an autoencoder that nothing sets."""
    fields = {field: getattr(found, field) for field in ("channels", "multipliers", "norm_groups")}
    return getattr(VAEConfig(**fields), name)
