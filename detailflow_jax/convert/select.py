"""Which of the entries of a file are the weights, and under which names.

A file is a tree of dicts, lists and objects. An entry is what has no parts, such as a tensor, under
its dotted path: "ema.module.encoder.latent_tokens". The weights are the entries under some prefix;
a function that recognises a network by its tensors' names finds the prefix, whatever it is called.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from detailflow_jax.convert import unnamed
from detailflow_jax.convert.errors import CheckpointError, some
from detailflow_jax.convert.pickled import RESAVE, ArraySpec
from detailflow_jax.convert.torch_file import Inert, items_of

Weights = Literal["model", "ema", "discriminator"]
Preference = Weights | Callable[[Collection[str]], Weights] | None
Recognise = Callable[[Collection[str]], int | None]
"""Names of tensors -> 0 if they are of the network wanted, 1 if of another one, else None."""

# Keys under which checkpoints keep the trained weights, the first one present being read.
_MODEL_KEYS = ("model", "module", "state_dict")
# Not exp_avg, which is Adam's.
_AVERAGE = re.compile(
    r"(?<![a-z])(emas?|swa|(?<!exp_)avg)(?![a-z])|EMA|Ema(?![a-z])|shadow|[Aa]verag|polyak"
)
_DISCRIMINATOR = re.compile(r"disc(riminator)?s?$")
_RAW = ("online", "collected")  # what a class that keeps an average keeps of the model
_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}  # beside an average
# What torch.compile, FSDP, checkpointing and adapters put into names, such as "_orig_mod",
# "_fsdp_wrapped_module" and "base_layer", and what DistributedDataParallel and DeepSpeed put before
# them.
_WRAPPERS = (
    "_(?![a-z_]*(?:ema|swa|averag))[a-z_]*mod(?:ule)?|"
    "(?:orig|original|wrapped|inner|base)_(?:mod|module|layer)"
)
_WRAPPER = re.compile(rf"(?<![^.])(?:{_WRAPPERS})\.")
_ANY_WRAPPER = re.compile(rf"(?<![^.])(?:{_WRAPPERS}|module)\.")
_FRONT = re.compile(r"^(?:module\.)+")
# A pickle can share one dict a million times; nobody wraps weights deeper than this.
_MOST_DEPTH, _MOST_ENTRIES = 8, 200_000


def entries(tree: Any) -> dict[str, Any]:
    """Returns everything in a tree by its dotted path, in the order in which it stands there.

    Where there is too much, what is less deep is walked first.
    """
    found: list[tuple[tuple[int, ...], str, Any]] = []  # with its place in each part around it
    level, total = [((), "", tree)], 1
    for depth in range(_MOST_DEPTH):
        deeper = []
        for place, path, value in level:
            parts = items_of(value) if depth < _MOST_DEPTH - 1 else None
            if parts is None or total > _MOST_ENTRIES:
                found.append((place, path, value))
                continue
            total += len(parts)
            for i, (key, part) in enumerate(parts):
                inner = f"{path}.{key_name(key)}" if path else key_name(key)
                if isinstance(key, str | float):  # averages of several decays
                    deeper.append(((*place, i), inner, part))
                else:
                    found.append(((*place, i), inner, None))  # No tensor has such a name.
        level = deeper
    return {path: value for _, path, value in sorted(found, key=lambda entry: entry[0])}


def select(
    entries: Mapping[str, Any],
    weights: Preference,
    recognise: Recognise | None,
    source: str,
    holds: str,
) -> tuple[dict[str, str], Weights, list[str]]:
    """Chooses the weights among the entries of a file.

    Args:
      entries: of the file, by path.
      weights: the set to take, see `readers.read_checkpoint`.
      recognise: finds the weights wherever they are. Without it, and where it finds nothing, they
        are where training checkpoints keep them.
      source: what messages call the file.
      holds: what messages say is in the file.

    Returns:
      name of a tensor, without wrappers and prefix -> path of its entry; the set that they are;
      what the user should know about the choice.

    Raises:
      CheckpointError: there are none, or one tensor is there under two names.
    """
    is_tensor = {p: getattr(x, "known", isinstance(x, np.ndarray)) for p, x in entries.items()}
    names = [path for path, known in is_tensor.items() if known]
    tensors = {path: entries[path] for path in names}
    found, misfits = _recognised(tensors, recognise) if recognise else ([], [])
    groups = found or _usual(names)
    sets = {label: [g for g in groups if g.label == label] for label in ("model", "ema")}
    if weights == "discriminator":
        weights = "model"
        sets["model"] = [g for g in groups if g.label == "discriminator"] or sets["model"]
    if callable(weights):
        weights = weights(next((g.names for g in groups), {}))
    wanted = weights or "model"
    other = "model" if wanted == "ema" else "ema"
    notices = []
    if wanted == "ema" and not sets["ema"] and misfits:
        raise CheckpointError(
            f"{source}: {misfits[0]}",
            expected="the parameters of the model beside it, in their order",
            remedy=f"weights='model' reads the model. {unnamed.RECIPE}",
        )
    if not sets[wanted] and sets[other]:
        lost = next((p for p in names if wanted == "ema" and _AVERAGE.search(p)), None)
        more = f" (those under {lost.rpartition('.')[0]!r} are of no network known)" if lost else ""
        notices.append(f"{source}: holds no {wanted!r} weights{more}; reading {other!r}")
        wanted = other
    if not sets[wanted]:
        raise CheckpointError(
            f"{source}: no weights in it (it holds: {holds})",
            expected="a dict of tensors, or one under 'model', 'module', 'state_dict', 'ema' or "
            "'model_ema'",
            remedy=RESAVE,
        )
    chosen, *aside = sorted(sets[wanted], key=_rank)
    if aside:
        others = ", ".join(repr(group.prefix) for group in aside)
        notices.append(f"{source}: reading the weights under {chosen.prefix!r}, not {others}")
    if all(bare.rpartition(".")[2].isdecimal() for bare in chosen.names):
        raise CheckpointError(
            f"{source}: {len(chosen.names)} tensors in a list, without names (it holds: {holds})",
            expected="a dict of tensors, or the model's state dict beside the list",
            remedy="In PyTorch, write `torch.save({'model': model.state_dict(), 'ema': "
            f"ema.state_dict()}}, ...)`. {unnamed.RECIPE}",
        )
    for bare in chosen.twice:
        raise CheckpointError(
            f"{source}: {bare!r} is there twice, with and without a prefix",
            expected="one tensor per name",
            remedy="Save the state dict of one module alone.",
        )
    if rest := _beside(chosen, [path for path, known in is_tensor.items() if not known]):
        notices.append(f"{source}: {len(rest)} entries are no tensors: {some(rest)}")
    unwanted = _COUNTERS if chosen.label == "ema" else set()
    paths = {bare: path for bare, path in chosen.names.items() if bare not in unwanted}
    # Weights may all be arrays of NumPy. Among tensors these are something else.
    arrays = [bare for bare, path in paths.items() if isinstance(entries[path], ArraySpec)]
    if 0 < len(arrays) < len(paths):
        notices.append(
            f"{source}: {len(arrays)} entries are NumPy arrays among tensors, left out: "
            f"{some(arrays)}"
        )
        paths = {bare: path for bare, path in paths.items() if bare not in arrays}
    return paths, chosen.label if chosen.label != "model" else wanted, notices


@dataclasses.dataclass(frozen=True)
class _Group:
    """Tensors under one prefix.

    Attributes:
      prefix: dotted path, without names of wrappers.
      names: name of a tensor -> path of the entry.
      twice: names that two entries have.
    """

    prefix: str
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    twice: list[str] = dataclasses.field(default_factory=list)

    def put(self, bare: str, path: str) -> None:
        if self.names.setdefault(bare, path) != path:
            self.twice.append(bare)

    @property
    def label(self) -> Weights:
        """Which set of weights the tensors are, by their prefix."""
        parts = self.prefix.split(".")
        if any(_DISCRIMINATOR.fullmatch(part) for part in parts):
            return "discriminator"
        raw = any(word in parts[-1] for word in _RAW)
        return "ema" if _AVERAGE.search(self.prefix) and not raw else "model"


def _rank(group: _Group) -> tuple[bool, int]:
    first = group.prefix.partition(".")[0]
    known = _MODEL_KEYS.index(first) if first in _MODEL_KEYS else len(_MODEL_KEYS)
    return bool(_AVERAGE.search(group.prefix)), known


def _beside(group: _Group, others: Collection[str]) -> list[str]:
    """Which of these paths are under the group's prefix, without it."""
    under = f"{group.prefix}." if group.prefix else ""
    if all(_ANY_WRAPPER.match(path) for path in group.names.values()):
        others = [path for path in others if _ANY_WRAPPER.match(path)]
    bare = [_ANY_WRAPPER.sub("", path) for path in others]
    return [path.removeprefix(under) for path in bare if path.startswith(under)]


def _recognised(tensors: Mapping[str, Any], recognise: Recognise) -> tuple[list[_Group], list[str]]:
    """The outermost groups whose tensors are of the network wanted, else of one that is known.

    Also says which averages are lists that do not fit any of these.
    """
    groups: dict[str, _Group] = {}
    for path in tensors:
        parts = _ANY_WRAPPER.sub("", path).split(".")
        for i in range(min(len(parts), _MOST_DEPTH)):
            prefix = ".".join(parts[:i])
            groups.setdefault(prefix, _Group(prefix)).put(".".join(parts[i:]), path)
    found: list[tuple[int, _Group]] = []
    misfits: list[str] = []
    for prefix in sorted(groups, key=lambda prefix: bool(prefix) + prefix.count(".")):
        group = groups[prefix]
        outer = [g for _, g in found if f"{prefix}.".startswith(f"{g.prefix}." if g.prefix else "")]
        # Inside of a network that is known, only its average or its discriminator is another one.
        if any(g.label == group.label for g in outer):
            continue
        rank = recognise(group.names)
        if rank is None and group.label == "ema":
            known = [g for _, g in found if g.label == "model"]
            group, why = _renamed(group, known, tensors)
            misfits += why
            rank = recognise(group.names)
        if rank is not None:
            found.append((rank, group))
            inner = set(groups[prefix].names.values())
            for g in outer:
                for bare in [bare for bare, path in g.names.items() if path in inner]:
                    del g.names[bare]
    best = min((rank for rank, _ in found), default=0)
    return [group for rank, group in found if rank == best], misfits


def _renamed(
    group: _Group, known: list[_Group], tensors: Mapping[str, Any]
) -> tuple[_Group, list[str]]:
    """An average with the names of a known group, and why a list has none of them.

    Some lost their dots, as latent-diffusion's, or have "_" instead; some are lists.
    """
    if known and all(bare.isdecimal() for bare in group.names):
        values = [tensors[path] for path in group.names.values()]
        models = [{bare: tensors[path] for bare, path in g.names.items()} for g in known]
        for names in (unnamed.names_of(values, model) for model in models):
            if names is not None:
                pairs = dict(zip(names, group.names.values(), strict=True))
                return _Group(group.prefix, pairs), []
        why = f"{group.prefix!r} is a list: {unnamed.misfit(values, models[0])}"
        return _Group(group.prefix), [why] if unnamed.is_large(values) else []
    bares = [bare for g in known[:1] for bare in g.names]
    named = {bare.replace(".", dot): bare for bare in bares for dot in ("", "_")}
    pairs = {named[bare]: path for bare, path in group.names.items() if bare in named}
    return _Group(group.prefix, pairs), []


def _usual(names: Collection[str]) -> list[_Group]:
    """Groups by the keys under which training checkpoints keep weights, the first ones only."""
    keys = {*_MODEL_KEYS, "ema", "model_ema", "discriminator"}
    groups: dict[str, _Group] = {}
    for path in names:
        parts = _FRONT.sub("", _WRAPPER.sub("", path)).split(".")
        count = next((i for i, part in enumerate(parts[:-1]) if part not in keys), len(parts) - 1)
        prefix = ".".join(parts[:count])
        groups.setdefault(prefix, _Group(prefix)).put(".".join(parts[count:]), path)
    wrapped = [group for prefix, group in groups.items() if prefix]
    return wrapped or list(groups.values())


def listed(tree: Any) -> str:
    """Returns what messages say that a file holds."""
    top = list(tree.items())[:10] if isinstance(tree, dict) else []
    inside = ", ".join(dict.fromkeys(f"{key_name(key)}{_kind(value)}" for key, value in top))
    return inside or _kind(tree) or type(tree).__name__


def key_name(key: Any) -> str:
    """Returns what messages call a key."""
    return (
        str(key) if isinstance(key, str | float) else f"a key of type {getattr(key, 'name', 'int')}"
    )


def _kind(value: Any) -> str:
    return f" (the Python object {value.name[:200]})" if isinstance(value, Inert) else ""
