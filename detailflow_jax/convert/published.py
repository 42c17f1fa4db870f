"""Published checkpoints as networks of this project: configuration, parameters and a report."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.readers import Weights, check_finite, read_checkpoint
from detailflow_jax.convert.tables import flowar, generator, siglip, tokenizer, vae
from detailflow_jax.models import flowar as flowar_network
from detailflow_jax.models import layers
from detailflow_jax.models.generator import Generator
from detailflow_jax.models.tokenizer import Tokenizer
from detailflow_jax.models.vae import VAE


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network that is published; adding one is an entry in `KINDS`.

    Attributes:
      name: as in `config.task`.
      title: what messages call it.
      names: the module with TABLE, SKIPPED, SIGNS, `buffers`, `infer_config` and `describe`.
      network: the Linen module class.
      example: configuration -> arguments that the network is initialised with.
      weights: which set the published evaluation takes of a file that holds both.
      file_name: configuration -> name of the weights in a published folder, without suffix.
      ema_key: key of the average in a published file.
    """

    name: str
    title: str
    names: Any
    network: Callable[[Any], nn.Module]
    example: Callable[[Any], tuple]
    weights: Weights
    file_name: Callable[[Any], str]
    ema_key: str = "ema"

    def initialize(self, config: Any, *, scan: bool) -> Callable[[jax.Array], dict]:
        """key -> initial parameters, unboxed, in the scanned or the unrolled layout."""
        network = self.network(with_scan(config, True))

        def init(key: jax.Array) -> dict:
            params = _unbox(network.init(key, *self.example(config))["params"])
            return params if scan else layers.unstack_layers(params)

        return init

    def abstract(self, config: Any, *, scan: bool) -> dict[str, Any]:
        """Parameters as shapes, in the scanned or the unrolled layout."""
        return jax.eval_shape(self.initialize(config, scan=scan), jax.random.key(0))


def with_scan(config: Any, scan: bool) -> Any:
    """The configuration with `scan` set; a network without scanned layers has one layout only."""
    has_scan = any(field.name == "scan" for field in dataclasses.fields(config))
    return dataclasses.replace(config, scan=scan) if has_scan else config


def _unbox(params: Any) -> Any:
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, params, is_leaf=is_box)


def _image(config: Any) -> tuple:
    # A single patch: the parameters' shapes do not depend on the grid.
    side = config.encoder.patch_size
    return (jnp.zeros((1, side, side, 3)),)


def _codes(config: Any) -> tuple:
    return jnp.zeros((1, config.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)


def _one_latent(config: Any) -> tuple:
    return (jnp.zeros((1, config.stride, config.stride, config.image_channels)),)


def _by_tokens(config: Any) -> str:
    return str(config.num_tokens)


def _by_stride(config: Any) -> str:
    return f"kl{config.stride}"


def _by_size(config: Any) -> str:
    sizes = flowar_network.SIZES.items()
    same = (name for name, size in sizes if size.items() <= dataclasses.asdict(config).items())
    return next(same, "FlowAR")


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "tokenizer", "DetailFlow tokenizer", tokenizer, Tokenizer, _image, "model", _by_tokens
        ),
        Kind("generator", "DetailFlow generator", generator, Generator, _codes, "ema", _by_tokens),
        Kind("vae", "KL autoencoder", vae, VAE, _one_latent, "model", _by_stride),
        Kind(
            "flowar",
            "FlowAR model",
            flowar,
            flowar_network.FlowAR,
            flowar_network.example,
            "ema",
            _by_size,
            "model_ema",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network read from a published file.

    Attributes:
      kind: "tokenizer", "generator" or "vae".
      config: of the network.
      params: nested NumPy parameters, float32.
      report: what became of every tensor.
      notices: what the user should know.
      source: the file read.
      dtypes: types of the tensors read, most frequent first.
    """

    kind: str
    config: Any
    params: dict[str, Any]
    report: mapping.Report
    notices: list[str]
    source: str
    dtypes: tuple[str, ...]


def load(
    kind: str | None,
    path: str | os.PathLike[str],
    *,
    weights: Weights | None = None,
    scan: bool = True,
    allow_missing: bool = False,
    allow_unused: bool = False,
    progress: Callable[[list], Iterable] = iter,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Reads a published checkpoint.

    Args:
      kind: "tokenizer", "generator" or "vae"; None is told by the tensors.
      path: what `read_checkpoint` takes.
      weights: "model" or "ema"; default what the published evaluation takes.
      scan: layout of the parameters.
      allow_missing: start a parameter anew that has no tensor.
      allow_unused: leave tensors aside that belong to no parameter.
      progress: wraps the list of what is to be read.
      overrides: of the configuration, by name.

    Raises:
      CheckpointError: nothing readable there, another network, a contradiction between tensors,
        configuration and overrides, a tensor that is missing, unused or of another shape.
    """

    def evaluated(names: Collection[str]) -> Weights:
        found = kind or kind_of(names)
        return KINDS[found].weights if found in KINDS else "model"

    read = read_checkpoint(path, weights or evaluated)
    kind = kind or kind_of(read.tensors)
    check_kind(kind if kind in KINDS else None, read.tensors, read.source)
    of = KINDS[kind]
    config, notices = of.names.infer_config(read.tensors, read.config, overrides or {}, read.source)
    params, report = mapping.from_published(
        of.names.TABLE,
        read.tensors,
        of.abstract(config, scan=scan),
        source=read.source,
        skip=of.names.SKIPPED,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        initial=lambda: jax.jit(of.initialize(config, scan=scan))(jax.random.key(0)),
        progress=progress,
    )
    used = {name: read.tensors[name] for name in report.loaded}
    bad = [f"{read.source}: {notice}" for notice in check_finite(used)]
    notices = [*read.notices, *notices, *bad]
    return Loaded(kind, config, params, report, notices, read.source, _dtypes(used))


def _dtypes(tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    names = [str(x.dtype) for x in tensors.values()]
    return tuple(sorted(set(names), key=lambda n: (-names.count(n), n)))


def kind_of(tensors: Collection[str]) -> str | None:
    """A name of `KINDS` or "SigLIP2 vision model", by the names of the tensors."""
    for name, kind in KINDS.items():
        if any(sign in tensors for sign in kind.names.SIGNS):
            return name
    return None if siglip.find(tensors) is None else "SigLIP2 vision model"


def check_kind(kind: str | None, tensors: Mapping[str, Any], source: str) -> None:
    """Refuses tensors of another network than `kind`, naming what they look like.

    None stands for any of `KINDS`, and is for tensors of none.
    """
    found = kind_of(tensors)
    if found == kind and found:
        return
    some = ", ".join(list(tensors)[:3]) or "no tensors"
    looks = f"looks like a {_called(found)}" if found else "is of no network known here"
    remedy = "Check that it is the right file."
    if found in KINDS:
        remedy = f"df.load_{found} loads it, config.init_from.model starts training from it."
    elif found:
        remedy = (
            "It needs no conversion: config.init_from.encoder and config.teacher.path of a "
            "tokenizer take it."
        )
    expected = _called(kind) if kind else " or ".join(kind.title for kind in KINDS.values())
    raise CheckpointError(
        f"{source}: {looks} (it holds {some}, ...)", expected=f"a {expected}", remedy=remedy
    )


def _called(kind: str) -> str:
    return KINDS[kind].title if kind in KINDS else kind
