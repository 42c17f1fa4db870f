"""What a configuration leaves out, taken from the data and the autoencoder that it names.

The manifest of codes or latents knows the classes, the vocabulary and the shapes of the data. An
autoencoder knows its own sizes. A field of the configuration that is None takes their value; a
field that is set is checked against it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from detailflow_jax import data
from detailflow_jax.convert.load import load_autoencoder
from detailflow_jax.models.autoencoder import AutoencoderConfig
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks.vae import autoencoder_config

Fact = tuple[str, Any, str]
"""A field below `config`, its value (never None), and where that comes from, for messages."""


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
    origins: dict[str, str] = {}
    filled: dict[str, Any] = {}
    with config.unlocked():
        for field, value, origin in make(config, defaults or {}):
            _settle(config, (field, value, origin), origins)
            filled[field] = list(value) if isinstance(value, tuple) else value
    if defaults is not None:  # Where the file has no default, that is what the data know.
        of_file = {name: x for name, x in defaults.items() if x is not None}
        object.__setattr__(config, "_defaults", defaults | filled | of_file)
    return config


def _settle(config: ConfigDict, fact: Fact, origins: dict[str, str]) -> None:
    """Fills the field in, and adds where it is from to `origins`; or checks it."""
    field, value, origin = fact
    section, _, name = field.partition(".")
    given = config[section].get(name)
    if given is None:
        with config.ignore_type():  # One number per channel may stand where one is usual.
            config[section][name], origins[field] = value, origin
    elif field == "model.num_classes" and given > value:
        return  # Published weights for 1,000 classes may be trained on with images of ten.
    elif _plain(given) != _plain(value):
        where = f"according to {origins[field]}" if field in origins else "in the configuration"
        remedy = (
            "use data and an autoencoder that belong together"
            if field in origins
            else f"set --config.{field}={value}, or train on what has {given}"
        )
        raise ConfigError(
            f"config.{field} is {given} {where}, but {value} according to {origin}: {remedy}"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _of_generator(config: ConfigDict, _: Mapping[str, Any]) -> Iterator[Fact]:
    kind, _, folder = config.data.source.partition(":")
    if kind != "codes":
        raise ConfigError(
            f"config.data.source={config.data.source!r}: a generator trains on codes:DIR, which "
            "`detailflow extract --tokenizer` writes"
        )
    manifest = data.CodeSource.read_manifest(folder)
    origin = f"the codes in {folder}"
    for name in ("num_classes", "codebook_size", "num_tokens", "group_size"):
        yield f"model.{name}", manifest[name], origin
    if config.model.get("head") == "flow":
        codebook = data.CodeSource.read_codebook(folder)
        yield "model.code_dim", codebook.shape[1], f"the codebook in {folder}"
    # None stands for one group.
    one_group = manifest["causal_num"] == manifest["group_size"]
    if not (one_group and config.model.get("causal_num") is None):
        yield "model.causal_num", manifest["causal_num"], origin


def _of_flowar(config: ConfigDict, defaults: Mapping[str, Any]) -> Iterator[Fact]:
    kind, _, folder = config.data.source.partition(":")
    scaling = {}
    if kind == "latents":
        manifest = data.LatentSource.read_manifest(folder)
        side, _, channels = manifest["latent_shape"]
        origin = f"the latents in {folder}"
        scaling = {name: manifest[name] for name in ("scale_factor", "shift_factor")}
        yield "model.num_classes", manifest["num_classes"], origin
        default = defaults.get("data.image_size")
        # The default is for images; whoever sets another side expects it to count.
        if default is not None and config.data.image_size != default:
            yield "data.image_size", manifest["image_size"], origin
        yield from _of_latents(config, side, channels, origin)
    else:
        source = data.make_source(
            config.data.source, config.data.get("split"), config.data.get("data_dir")
        )
        yield "model.num_classes", source.num_classes, f"the images of {source.name}"
    vae = config.get("vae") or {}
    if vae.get("path"):
        found = load_autoencoder(vae, scaling).config
        origin = f"the autoencoder {vae.path}"
        for name, default in _defaults_of(found).items():
            # A field that the configuration does not have is added only if it is needed.
            if name in vae or _plain(getattr(found, name)) != default:
                yield f"vae.{name}", getattr(found, name), origin
    elif kind != "latents" and vae.get("random"):
        fields = {name: x for name, x in vae.items() if name not in ("path", "random")}
        found, origin = autoencoder_config(fields, "config.vae"), "the random one of config.vae"
    else:
        return
    if kind != "latents":
        side = config.data.image_size // found.stride
        origin = f"{origin} at config.data.image_size={config.data.image_size}"
        yield from _of_latents(config, side, found.latent_channels, origin)


def _defaults_of(config: AutoencoderConfig) -> dict[str, Any]:
    """The fields of an autoencoder that decide its numbers, with their defaults."""
    sizes: dict[str, Any] = {}
    if isinstance(config, VAEConfig):  # Some defaults follow from sizes.
        sizes = {n: getattr(config, n) for n in ("channels", "multipliers", "norm_groups")}
    usual = dataclasses.asdict(type(config)(**sizes))
    if "architecture" in usual:  # Without the field it is a KL autoencoder.
        usual["architecture"] = "kl"
    return {name: x for name, x in usual.items() if name != "dtype"}


def _of_latents(config: ConfigDict, side: int, channels: int, origin: str) -> Iterator[Fact]:
    origin = f"{origin} ({side} x {side} x {channels})"
    yield "model.channels", channels, origin
    scales = config.model.get("scales")
    fitting = scales is not None and tuple(scales)[-1:] == (side,)
    yield "model.scales", tuple(scales) if fitting else doubling(side), origin


def doubling(side: int) -> tuple[int, ...]:
    """The usual scale schedule of a latent: 1, 2, 4, ... below its side, then the side."""
    return (*(2**i for i in range(side.bit_length()) if 2**i < side), side)
