"""The configuration of a network from its tensors, the file's own settings and overrides.

The tensors' shapes are always right. An override comes before the configuration beside the weights.
Either raises an error if it contradicts the shapes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.runtime.errors import near_names, raised_as

# A configuration may say anything; what is made from it (masks of N x N) must stay bounded.
_MOST = 1 << 14

Names = Mapping[str, str | Sequence[str]]
"""Name of our field -> its name in a published configuration, or several of which the first one
present counts."""


def published_fields(config: Any, names: Names) -> dict[str, Any]:
    """Returns the fields of a configuration under their (first) published names."""
    fields = {}
    for ours, theirs in names.items():
        value = getattr(config, ours)
        name = theirs if isinstance(theirs, str) else theirs[0]
        fields[name] = list(value) if isinstance(value, tuple) else value
    return fields


def unlike(config: Any, usual: Mapping[str, Any]) -> list[str]:
    """Returns what differs in a configuration from `usual`: ["num_classes=10 (not 1000)", ...]."""
    values = {name: getattr(config, name) for name in usual}
    return [f"{n}={x} (not {usual[n]})" for n, x in values.items() if x != usual[n]]


@dataclasses.dataclass
class Settings:
    """Collects the fields of a network's configuration; contradictions raise CheckpointError.

    Attributes:
      tensors: published name -> anything with `.shape`.
      published: the configuration beside the tensors, may be empty.
      overrides: values by name of our field; each is removed when it is used.
      source: what messages call the file.
      names: of the published configuration.
      fields: what has been settled so far, by the name of our field.
      notices: what the user should know: a value that had to be assumed.
    """

    tensors: Mapping[str, Any]
    published: Mapping[str, Any]
    overrides: dict[str, Any]
    source: str
    names: Names
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    notices: list[str] = dataclasses.field(default_factory=list)

    def by_shape(self, name: str, value: Any) -> None:
        """Settles a field by shapes; raises CheckpointError if something contradicts them."""
        if name in self.names:
            self.check(name, value)
        given = self.overrides.pop(name, None)
        if given is not None and given != value:
            raise CheckpointError(
                f"{self.source}: the override {name}={given} contradicts the weights, whose "
                f"shapes say {name}={value}",
                remedy="Leave the override out, or name the file that it belongs to.",
            )
        self.fields[name] = value

    def check(self, name: str, value: Any) -> None:
        """Raises CheckpointError if the configuration has another value of our field `name`."""
        for theirs in self._published_names(name):
            said = self.published.get(theirs)
            if said is not None and said != (list(value) if isinstance(value, tuple) else value):
                self.contradict(theirs, f"{said!r:.99}", value)

    def _published_names(self, name: str) -> Sequence[str]:
        names = self.names.get(name, name)
        return (names,) if isinstance(names, str) else names

    def contradict(self, name: str, said: str, found: Any) -> NoReturn:
        """Raises CheckpointError: the configuration says one thing, the weights another."""
        raise CheckpointError(
            f"{self.source}: the configuration beside the weights says {name}={said}, the weights "
            f"themselves say {found}",
            expected="a configuration of these weights",
            remedy="Put the right config.json beside them, or none: shapes and overrides then "
            "tell the sizes.",
        )

    def told(
        self,
        name: str,
        kind: type,
        *,
        default: Any = None,
        why: str = "",
        signed: bool = False,
        needed: str = "",
        several: bool = False,
    ) -> Any:
        """Settles and returns a field that no shape determines.

        It comes from the override, else from the configuration, else it is the default.

        Args:
          name: of our field.
          kind: int or float.
          default: None, or a value of this kind.
          why: where a default comes from; if given, a notice says that it was used.
          signed: whether zero and negative numbers are allowed.
          needed: what the field is, if None is no value for it.
          several: whether a list of such values may be given.

        Raises:
          CheckpointError: a value of another kind, or none where one is needed.
        """
        found = [n for n in self._published_names(name) if n in self.published]
        if name in self.overrides:
            value = self.overrides.pop(name)
        elif found:
            value = self.published[found[0]]
        else:
            value = default
            if value is None and needed:
                raise CheckpointError(
                    f"{self.source}: nothing tells {name}", expected=f"{name}=..., {needed}"
                )
            if why:
                self.notices.append(f"{self.source}: nothing tells {name}; {value} taken, {why}")
        above = -_MOST if signed else 0
        if several and isinstance(value, list | tuple):
            value = tuple(self._number(name, x, kind, above) for x in value)
        elif not (value is None and default is None):
            value = self._number(name, value, kind, above)
        self.fields[name] = value
        return value

    def _number(self, name: str, value: Any, kind: type, above: int) -> int | float:
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not (is_number and above < value <= _MOST):
            least = f"from {above + 1}" if kind is int else f"above {above}"
            raise CheckpointError(
                f"{self.source}: {name}={value!r:.99}",
                expected=f"{kind.__name__} {least} to {_MOST}",
            )
        return kind(value)

    def only(
        self,
        name: str,
        supported: Any,
        meaning: str,
        where: str = "as in every published DetailFlow",
    ) -> None:
        """Raises CheckpointError if the configuration has another value than the supported one."""
        said = self.published.get(name)
        if said is not None and said != supported:
            raise CheckpointError(
                f"{self.source}: its configuration says {name}={said!r:.99}, {meaning}",
                expected=f"{name}={supported!r}, {where}",
                remedy="Such a network is not supported here.",
            )

    def build(self, config: type) -> Any:
        """Returns a `config` of the settled fields and of overrides of other fields.

        Raises:
          CheckpointError: an unknown override, or values that do not belong together.
        """
        known = [field.name for field in dataclasses.fields(config)]
        for name in self.overrides:
            if name in self.fields or name not in known:
                near = near_names(name, known) or known
                raise CheckpointError(
                    f"{self.source}: unknown override {name!r}",
                    expected=f"a field of {config.__name__} such as {', '.join(near)}",
                )
        with raised_as(CheckpointError, f"{self.source}: "):
            return config(**self.fields, **self.overrides)

    def size(self, name: str, axis: int, rank: int = 2) -> int:
        """Returns one dimension of a tensor of `rank` dimensions that every such file has.

        Raises:
          CheckpointError: no such tensor, or one of another rank.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} is missing",
                remedy="Is this a checkpoint of another network, or a part of one?",
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != rank:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} has shape {shape}", expected=f"{rank} dimensions"
            )
        return int(shape[axis])


def count_layers(tensors: Mapping[str, Any], prefix: str) -> int:
    """Returns how many layers there are, whose tensors are named PREFIX0.x, PREFIX1.x, ..."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return 1 + max((int(n) for n in numbers if n.isdecimal() and len(n) < 4), default=-1)
