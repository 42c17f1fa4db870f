"""The registry of networks: one entry each, which all of loading, conversion and evaluation reads.

A network is its module in `models/`, its table in `convert/tables/` and its entry here. A network
of another package is added by `register`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from detailflow_jax.convert.mapping import Entry
from detailflow_jax.convert.readers import Weights
from detailflow_jax.convert.settings import Settings
from detailflow_jax.convert.tables import (
    discriminator,
    flowar,
    generator,
    inception,
    lpips,
    siglip,
    tokenizer,
    vae,
)
from detailflow_jax.models import flowar as flowar_network
from detailflow_jax.models import layers
from detailflow_jax.models.discriminator import Dino, make
from detailflow_jax.models.generator import Generator
from detailflow_jax.models.inception import Inception
from detailflow_jax.models.lpips import LPIPS, SMALLEST
from detailflow_jax.models.siglip import VisionTransformer
from detailflow_jax.models.tokenizer import Tokenizer
from detailflow_jax.models.vae import VAE
from detailflow_jax.tasks import flowar as flowar_task
from detailflow_jax.tasks import generator as generator_task
from detailflow_jax.tasks import tokenizer as tokenizer_task
from detailflow_jax.tasks import vae as vae_task

Layout = tuple[tuple[Entry, ...], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose weights are published.

    Attributes:
      name: key in `NETWORKS`; of a network that is trained here the name of its task.
      title: what messages call it.
      recognise: names of a file's tensors -> whether they are of this network.
      module: configuration -> Linen module.
      example: configuration -> arguments that the module is initialised with.
      table: published tensor names <-> parameter paths.
      skipped: prefixes of published names that are left out by design.
      layout: (names, parameters, source) -> (table, skipped), where files differ in their names.
      infer_config: what is known of a file -> configuration. None: the network has none, or the
        caller has to know it.
      from_run: the `model` part of a run's config -> configuration. None: it has no runs.
      describe: configuration -> (config.json, what config.yaml holds beside it, notices), for
        writing. None: it is read only.
      buffers: configuration -> published name -> array that strict loading asks for besides.
      file_name: configuration -> name of the weights in a published folder, without suffix.
      weights: the set that the published evaluation takes of a file that holds several.
      ema_key: key of the moving average in a published file.
      task: the task that trains it, or None.
      used_by: fields or options that name its files, for messages.
      files: keys of its files in `runtime.weights.WEIGHTS`.
    """

    name: str
    title: str
    recognise: Callable[[Collection[str]], bool]
    module: Callable[[Any], nn.Module]
    example: Callable[[Any], tuple]
    table: tuple[Entry, ...] = ()
    skipped: tuple[str, ...] = ()
    layout: Callable[[Mapping[str, Any], Any, str], Layout] | None = None
    infer_config: Callable[[Settings], Any] | None = None
    from_run: Callable[[Any], Any] | None = None
    describe: Callable[[Any], tuple[dict[str, Any], dict[str, Any], list[str]]] | None = None
    buffers: Callable[[Any], dict[str, Any]] = lambda config: {}
    file_name: Callable[[Any], str] = lambda config: "model"
    weights: Weights = "model"
    ema_key: str = "ema"
    task: str | None = None
    used_by: str = ""
    files: tuple[str, ...] = ()

    def infer(
        self,
        tensors: Mapping[str, Any],
        published: Mapping[str, Any],
        overrides: Mapping[str, Any],
        source: str,
    ) -> tuple[Any, list[str]]:
        """The configuration that these tensors are of, and notices about what was assumed.

        Args:
          tensors: published name -> anything with `.shape`.
          published: the configuration beside them, may be empty.
          overrides: values by name; fields of the configuration, and head counts.
          source: what messages call the file.

        Raises:
          CheckpointError: a contradiction, a value that is not known, an unknown override.
        """
        settings = Settings(tensors, published, overrides, source)
        config = self.infer_config(settings) if self.infer_config else None
        return config, settings.notices

    def initialize(self, config: Any, *, scan: bool) -> Callable[[jax.Array], dict]:
        """key -> initial parameters, unboxed, in the scanned or the unrolled layout."""
        module = self.module(with_scan(config, True))

        def init(key: jax.Array) -> dict:
            params = _unboxed(module.init(key, *self.example(config))["params"])
            return params if scan else layers.unstack_layers(params)

        return init

    def abstract(self, config: Any, *, scan: bool) -> dict[str, Any]:
        """Parameters as shapes, in the scanned or the unrolled layout."""
        return jax.eval_shape(self.initialize(config, scan=scan), jax.random.key(0))


NETWORKS: dict[str, Network] = {}
"""Every network by name; files are recognised in this order."""


def register(network: Network) -> Network:
    """Adds a network to `NETWORKS`; raises ValueError if the name is taken."""
    if NETWORKS.setdefault(network.name, network) is not network:
        raise ValueError(f"there is a network {network.name!r} already; expected another name")
    return network


def with_scan(config: Any, scan: bool) -> Any:
    """The configuration with `scan` set; a network without scanned layers has one layout only."""
    names = [field.name for field in dataclasses.fields(config)] if config is not None else []
    return dataclasses.replace(config, scan=scan) if "scan" in names else config


def _unboxed(params: Any) -> Any:
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, params, is_leaf=is_box)


def any_of(signs: Collection[str]) -> Callable[[Collection[str]], bool]:
    """names -> whether any of `signs` is among them."""
    return lambda names: any(sign in names for sign in signs)


def _image(side: int) -> jax.Array:
    return jnp.zeros((1, side, side, 3))


register(
    Network(
        name="tokenizer",
        title="DetailFlow tokenizer",
        recognise=any_of(tokenizer.SIGNS),
        module=Tokenizer,
        # A single patch: the parameters' shapes do not depend on the grid.
        example=lambda config: (_image(config.encoder.patch_size),),
        table=tokenizer.TABLE,
        skipped=tokenizer.SKIPPED,
        infer_config=tokenizer.infer_config,
        from_run=tokenizer_task.model_config,
        describe=tokenizer.describe,
        buffers=tokenizer.buffers,
        file_name=lambda config: str(config.num_tokens),
        task="tokenizer",
    )
)
register(
    Network(
        name="generator",
        title="DetailFlow generator",
        recognise=any_of(generator.SIGNS),
        module=Generator,
        example=lambda c: (jnp.zeros((1, c.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)),
        table=generator.TABLE,
        skipped=generator.SKIPPED,
        infer_config=generator.infer_config,
        from_run=generator_task.model_config,
        describe=generator.describe,
        buffers=generator.buffers,
        file_name=lambda config: str(config.num_tokens),
        weights="ema",
        task="generator",
    )
)
register(
    Network(
        name="vae",
        title="KL autoencoder",
        recognise=any_of(vae.SIGNS),
        module=VAE,
        example=lambda c: (jnp.zeros((1, c.stride, c.stride, c.image_channels)),),
        table=vae.TABLE,
        skipped=vae.SKIPPED,
        infer_config=vae.infer_config,
        from_run=vae_task.model_config,
        describe=vae.describe,
        file_name=lambda config: f"kl{config.stride}",
        task="vae",
        used_by="config.vae.path",
        files=("kl16",),
    )
)
register(
    Network(
        name="flowar",
        title="FlowAR model",
        recognise=any_of(flowar.SIGNS),
        module=flowar_network.FlowAR,
        example=flowar_network.example,
        table=flowar.TABLE,
        skipped=flowar.SKIPPED,
        infer_config=flowar.infer_config,
        from_run=flowar_task.model_config,
        describe=flowar.describe,
        buffers=flowar.buffers,
        file_name=flowar.file_name,
        weights="ema",
        ema_key="model_ema",
        task="flowar",
    )
)
register(
    Network(
        name="siglip2",
        title="SigLIP2 vision model",
        recognise=lambda names: siglip.find(names) is not None,
        module=VisionTransformer,
        example=lambda config: (_image(config.patch_size),),
        layout=siglip.layout,
        infer_config=siglip.infer_config,
        used_by="config.init_from.encoder and config.teacher.path of a tokenizer",
        files=("siglip2",),
    )
)
register(
    Network(
        name="dino",
        title="DINO vision transformer",
        recognise=any_of(discriminator.DINO_SIGNS),
        module=Dino,
        example=lambda config: (_image(config.image_size),),
        table=discriminator.DINO,
        skipped=discriminator.DINO_SKIPPED,
        infer_config=discriminator.infer_dino,
        used_by="config.discriminator.path",
        files=("dino",),
    )
)
register(
    Network(
        name="discriminator",
        title="trained discriminator",
        recognise=discriminator.find,
        module=lambda config: make(config).network,
        example=lambda config: (),  # Its variables are known to the caller, who passes `params`.
        layout=discriminator.layout,
        weights="discriminator",
        used_by="config.init_from.discriminator",
    )
)
register(
    Network(
        name="lpips",
        title="perceptual network (LPIPS)",
        recognise=lpips.recognise,
        module=lambda config: LPIPS(),
        example=lambda config: (_image(SMALLEST), _image(SMALLEST)),
        layout=lpips.layout,
        used_by="config.losses.perceptual.path, config.losses.perceptual.linear and --lpips",
        files=("vgg16", "lpips"),
    )
)
register(
    Network(
        name="inception",
        title="feature network of FID (Inception)",
        recognise=lambda names: all(sign in names for sign in inception.SIGNS),
        module=lambda config: Inception(),
        example=lambda config: (_image(299),),
        table=inception.TABLE,
        skipped=inception.COUNTERS,
        used_by="--inception",
        files=("inception",),
    )
)
