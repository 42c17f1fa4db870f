"""Loss terms: one file each, and the record of a step that they are computed from.

A term is an object made from its section of the configuration, `config.losses.NAME`. A term of
weight 0 is not made: it computes nothing and needs no weights. A term of your own is a subclass of
`Loss` in your own module, named as `config.losses.NAME.module = "my_module:MyLoss"`.

Shapes: B batch, N tokens (fewer where the input is smaller), R image side, S decoded side, V codes,
d code dimension, P patches, D width of the teacher. n is B, or 2B with self-correction: what is
decoded from clean codes, then from corrected ones.
"""

import abc
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from detailflow_jax.ops import Array, padded
from detailflow_jax.runtime.errors import ConfigError, near_names
from detailflow_jax.runtime.weights import Need
from detailflow_jax.tasks import TrainState

Scalar = Float[Array, ""]
HERE = "detailflow_jax.tasks.losses"
TERMS = {  # in the order in which they are added up
    "vq": f"{HERE}.quantizer:VQ",
    "commit": f"{HERE}.quantizer:Commitment",
    "entropy": f"{HERE}.quantizer:Entropy",
    "repa": f"{HERE}.repa:Repa",
    "perceptual": f"{HERE}.perceptual:Perceptual",
    "mse": f"{HERE}.mse:MSE",
    "align": f"{HERE}.align:Align",
    "kl": f"{HERE}.kl:KL",
    "adversarial": f"{HERE}.adversarial:Adversarial",
}
"""Name of a section -> "module:class" of the terms of this package."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of the tokenizer's encoder through the quantizer.

    Attributes:
      z: normalised latents.
      entries: the normalised codebook entries chosen.
      distances: squared, to every code.
    """

    z: Float[Array, "B N d"]
    entries: Float[Array, "B N d"]
    distances: Float[Array, "B N V"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step made, inside of the function that is differentiated.

    Attributes:
      images: in [-1, 1].
      target: what the reconstruction should be.
      reconstruction: of clean codes, then of corrected ones.
      part: which part of target and reconstruction is the image; the rest is zero. None: all.
      latents: what was decoded, [n, N, d]; of the autoencoder [B, h, w, C], scaled.
      codes: clean codes, or None.
      passes: of the tokenizer: the clean pass and, with self-correction, the corrected one.
      span: where the noise is, or None without self-correction.
      aligned: projection of the first code, [B, D]; None where the network has none.
      tapped: projected tokens of a decoder block, [n, P, D]; None where the network has none.
      posterior: of the autoencoder, or None.
      watched: scalars to log beside the losses.
      state: `TrainState` at the start of the step. `state.step` is its number, `state.frozen` has
        the parameters of frozen networks.
      key: PRNG key of the step.
      features: name of a frozen network -> its features of `images`.
      kept: what a term passes to its own `update`; the only field that a term writes to.
    """

    images: Float[Array, "B R R 3"]
    target: Float[Array, "B S S 3"]
    reconstruction: Float[Array, "n S S 3"]
    latents: Float[Array, "n ..."]
    codes: Int[Array, "B N"] | None = None
    passes: tuple[Pass, ...] = ()
    span: Any = None
    aligned: Any = None
    tapped: Any = None
    part: padded.Part | None = None
    posterior: Any = None
    watched: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    # The trainer adds these: the function that makes a step does not know them.
    state: Any = None
    key: Any = None
    features: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)

    def repeated_target(self) -> Float[Array, "n S S 3"]:
        """The target of every reconstruction."""
        return jnp.concatenate([self.target] * (len(self.reconstruction) // len(self.target)))


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """A network that a term uses but does not train, and where its weights come from.

    Attributes:
      name: key of its parameters in `TrainState.frozen`.
      network: key in the registry of networks, which reads its files.
      init: PRNG key -> random parameters.
      files: (description of the weights, path that the configuration names or None) for each file.
      random: keep the random parameters, to try the code.
      features: (parameters, images [B, R, R, 3]) -> features, computed once per step; or None.
      config: the network that the files must hold; None: the shapes of the parameters say it.
      untold: fields of `config` that the files cannot tell.
      described: the section that `config` was made from, for messages.
      dtype: in which the network multiplies by its kernels.
    """

    name: str
    network: str
    init: Callable[[PRNGKeyArray], Any]
    files: tuple[tuple[Need, str | None], ...] = ()
    random: bool = False
    features: Callable[[Any, Array], Array] | None = None
    config: Any = None
    untold: tuple[str, ...] = ()
    described: str = ""
    dtype: str = "float32"

    def start(self, key: PRNGKeyArray) -> Any:
        """Random parameters, with the kernels as they are used: in bfloat16 half the memory."""

        def held(path, leaf):
            kernel = any(getattr(part, "key", None) == "kernel" for part in path)
            return leaf.astype(self.dtype) if kernel else leaf

        return jax.tree_util.tree_map_with_path(held, self.init(key))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a loss term knows when it is made.

    Attributes:
      config: the whole configuration.
      network: configuration of the network in training.
      smallest: the smallest side of a reconstruction, in pixels.
    """

    config: Any
    network: Any
    smallest: int


@dataclasses.dataclass(frozen=True, eq=False)
class Loss(abc.ABC):
    """A loss term. Its fields are those of its section of the configuration.

    Attributes:
      weight: factor of the term.
    """

    weight: float

    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of `Step` that the term needs and not every task makes."""

    padded: ClassVar[bool] = False
    """Whether the term is right for a part of an image (`Step.part`). Each class says so itself:
    what a subclass computes may be another matter."""

    @property
    def frozen(self) -> Frozen | None:
        """The frozen network that the term needs."""
        return None

    @property
    def balanced(self) -> bool:
        """Whether the term's gradient is made as large as that of the others, by `balance`."""
        return False

    @classmethod
    def make(cls, name: str, section: Mapping[str, Any], setting: Setting) -> "Loss":
        """The term of `config.losses.NAME`; raises ConfigError if it cannot be."""
        del setting
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        for field in section:
            if field not in known:
                raise ConfigError(
                    f"config.losses.{name}.{field} is no field of {cls.__name__}; expected "
                    f"{', '.join(near_names(field, known) or known)}"
                )
        return cls(**section)

    @abc.abstractmethod
    def __call__(self, step: Step) -> Scalar:
        """The term without its weight."""

    def factor(self, step: Step) -> float | Scalar:
        """The weight at this step."""
        del step
        return self.weight

    def balance(self, others: Array, ours: Array, number: Int[Array, ""]) -> Scalar:
        """What a `balanced` term is multiplied by.

        Args:
          others: gradient of the other terms with respect to the network's last kernel.
          ours: gradient of this term, weight included.
          number: of the step.
        """
        del others, ours, number
        return jnp.ones(())

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """State of the term's own networks: name in `TrainState.extra` -> initial value."""
        del key
        return {}

    def update(
        self, state: TrainState, kept: dict[str, Any], key: PRNGKeyArray
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """After the gradient: (new values of what `init` gave, {metric: scalar})."""
        del state, kept, key
        return {}, {}


def make_losses(setting: Setting) -> dict[str, Loss]:
    """The terms of `config.losses` whose weight is not 0, in a fixed order.

    Raises:
      ConfigError: there is no such term, or fields contradict each other.
    """
    sections = setting.config.losses.to_dict()
    ordered = [name for name in TERMS if name in sections] + sorted(sections.keys() - TERMS.keys())
    losses = {}
    for name in ordered:
        section = dict(sections[name])
        path = section.pop("module", None) or TERMS.get(name)
        if "weight" not in section:
            raise ConfigError(f"config.losses.{name} has no field `weight`")
        if section["weight"]:
            kind = _class_of(name, path)
            if setting.config.get("decode_buckets") and not vars(kind).get("padded"):
                raise ConfigError(
                    f"config.losses.{name} is computed of whole images: {kind.__name__} does not "
                    "say `padded = True` (tasks/losses/__init__.py). Set config.decode_buckets=0 "
                    f"or config.losses.{name}.weight=0"
                )
            losses[name] = kind.make(name, section, setting)
    return losses


def _class_of(name: str, path: str | None) -> type[Loss]:
    if path is None:
        near = ", ".join(near_names(name, TERMS) or TERMS)
        raise ConfigError(
            f"config.losses.{name}: there is no such term; closest names: {near}. A term of your "
            f'own names its class: config.losses.{name}.module = "my_module:MyLoss"'
        )
    module, _, attribute = path.partition(":")
    where = f"config.losses.{name}.module={path!r}"
    try:
        found = getattr(importlib.import_module(module), attribute or "Loss", None)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # of what the module imports
        raise ConfigError(
            f"{where}: there is no module {error.name}; add its folder to PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Loss)):
        raise ConfigError(f'{where}: expected "module:class", the class a subclass of {HERE}.Loss')
    return found


def compute(losses: Mapping[str, Loss], step: Step) -> dict[str, Scalar]:
    """{name: scalar} of every term, weights included.

    Raises:
      ConfigError: a term needs what the task does not make.
    """
    for name, loss in losses.items():
        for field in loss.reads:
            value = getattr(step, field)
            if value is None or (isinstance(value, tuple) and not value):
                raise ConfigError(
                    f"config.losses.{name} needs {field!r}, which this task does not make; set "
                    f"config.losses.{name}.weight=0"
                )
    return {name: loss.factor(step) * loss(step) for name, loss in losses.items()}
