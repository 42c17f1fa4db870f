"""What describes a network to loading, conversion, training and evaluation: one entry each."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry
from detailflow_jax.convert.select import Weights
from detailflow_jax.convert.settings import Names, Settings
from detailflow_jax.models import layers
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.weights import fields_of

Layout = tuple[tuple[Entry, ...], tuple[str, ...]]
Description = tuple[dict[str, Any], dict[str, Any], list[str]]
Diffusers = tuple[tuple[Entry, ...], dict[str, Any]]
Options = Mapping[str, tuple[Callable[[str], Any], str]]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose weights are published.

    Attributes:
      name: key in `registry.NETWORKS`; of a network that is trained here the name of its task.
      title: what messages call it.
      recognise: names of a file's tensors -> whether they are of this network.
      module: configuration -> Linen module.
      example: configuration -> arguments that the module is initialised with.
      table: published tensor names <-> parameter paths.
      skipped: prefixes of published names that are left out by design.
      optional: prefixes of published names that only training uses. Training that starts from a
        file without them initialises their parameters.
      layout: (names, parameters, source) -> (table, skipped), where files differ in their names.
      infer_config: what is known of a file -> configuration of the network that its tensors are of.
        None: the network has none, or the caller has to know it.
      from_run: the `model` part of a run's config -> configuration. None: it is not trained here.
      describe: configuration -> (config.json, exactly fields that the published code knows; what
        config.yaml holds besides: what it evaluates with, and what no published field can say;
        notices of what the published code cannot build). None: it is read only.
      diffusers: (configuration, parameters) -> (table of diffusers' names, its config.json). None:
        diffusers has no such network.
      names: our fields in the published configuration.
      options: name of an override -> (text -> value, help), for the `convert` command.
      buffers: configuration -> published name -> array that strict loading asks for besides.
      file_name: configuration -> name of the weights in a published folder, without suffix.
      weights: the set that the published evaluation takes of a file that holds several.
      ema_key: key of the moving average in a published file.
      encoder: top-level names of the parameters that decide the codes or latents of an image.
      wants: what a published script reads and only a file written so on request has (a key, or
        "bare" for a state dict under no key) -> the script.
      files: keys of its files in `runtime.weights.WEIGHTS`.
      field: the field that names its file, where `files` has none.
    """

    name: str
    title: str
    recognise: Callable[[Collection[str]], bool]
    module: Callable[[Any], nn.Module]
    example: Callable[[Any], tuple]
    table: tuple[Entry, ...] = ()
    skipped: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    layout: Callable[[Mapping[str, Any], Any, str], Layout] | None = None
    infer_config: Callable[[Settings], Any] | None = None
    from_run: Callable[[Any], Any] | None = None
    describe: Callable[[Any], Description] | None = None
    diffusers: Callable[[Any, Mapping[str, Any]], Diffusers] | None = None
    names: Names = dataclasses.field(default_factory=dict)
    options: Options = dataclasses.field(default_factory=dict)
    buffers: Callable[[Any], dict[str, Any]] = lambda config: {}
    file_name: Callable[[Any], str] = lambda config: "model"
    weights: Weights = "model"
    ema_key: str = "ema"
    encoder: tuple[str, ...] = ()
    wants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    field: str = ""

    @property
    def task(self) -> str | None:
        """Name of the task that trains it, or None."""
        return self.name if self.from_run else None

    @property
    def used_by(self) -> str:
        """The fields and options that name its files, for messages."""
        return self.field or ", ".join(fields_of(self.files))

    def infer(
        self,
        tensors: Mapping[str, Any],
        published: Mapping[str, Any],
        overrides: Mapping[str, Any],
        source: str,
    ) -> tuple[Any, list[str]]:
        """Returns the configuration that these tensors are of, and notices of what was assumed.

        The arguments are those of `Settings`, which this leaves as they are.

        Raises:
          CheckpointError: a contradiction, a value that is not known, an unknown override.
        """
        if self.infer_config is None:
            for name in overrides:
                raise CheckpointError(f"unknown override {name!r}: a {self.title} has none")
            return None, []
        settings = Settings(tensors, published, dict(overrides), source, self.names)
        return self.infer_config(settings), settings.notices

    def initialize(self, config: Any, *, scan: bool) -> Callable[[jax.Array], dict]:
        """Returns key -> initial parameters, in the scanned or the unrolled layout."""
        return functools.partial(_initialize, self.module, self.example, config, scan)

    def abstract(self, config: Any, *, scan: bool) -> dict[str, Any]:
        """Returns the parameters as shapes, in the scanned or the unrolled layout."""
        arguments = self.module, self.example, config, scan
        try:
            hash(arguments)
        except TypeError:  # A network from outside may have a configuration that is no key.
            return _abstract(*arguments)
        return jax.tree.map(lambda x: x, _kept_abstract(*arguments))  # Dicts of the caller's own.


def _initialize(module: Callable, example: Callable, config: Any, scan: bool, key: Any) -> dict:
    boxed = module(with_scan(config, True)).init(key, *example(config))["params"]
    params = sharding.unboxed(boxed)
    return params if scan else layers.unstack_layers(params)


def _abstract(*arguments: Any) -> dict:
    return jax.eval_shape(functools.partial(_initialize, *arguments), jax.random.key(0))


# To trace a network takes up to seconds, and one program may load several of a kind.
_kept_abstract = functools.lru_cache(maxsize=16)(_abstract)


def with_scan(config: Any, scan: bool) -> Any:
    """Returns the configuration with `scan` set, where the network has layers to scan."""
    return dataclasses.replace(config, scan=scan) if hasattr(config, "scan") else config


def any_of(signs: Collection[str]) -> Callable[[Collection[str]], bool]:
    """Returns the function names -> whether any of `signs` is among them."""
    return lambda names: any(sign in names for sign in signs)


def image(side: int) -> jax.Array:
    """Returns a black image [1, side, side, 3] to initialise a network with."""
    return jax.numpy.zeros((1, side, side, 3))
