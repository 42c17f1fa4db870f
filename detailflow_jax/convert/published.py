"""Published checkpoints as networks of this project: configuration, parameters and a report."""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError, some
from detailflow_jax.convert.readers import check_finite, read_checkpoint
from detailflow_jax.convert.registry import NETWORKS, Network
from detailflow_jax.convert.select import Weights
from detailflow_jax.ops import interpolation
from detailflow_jax.runtime.weights import WEIGHTS

_POSITIONS = "position_embedding.weight"
_TOKENS = ("latent_pos_embed", "latent_tokens", "refined_tokens")  # rows in the order of tokens
_CLASSES = "class_embedding/embedding"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network read from a file.

    Attributes:
      kind: its name in `registry.NETWORKS`.
      config: of the network; None where parameters were asked for by their shapes.
      params: nested NumPy parameters, float32.
      report: what became of every tensor.
      notices: what the user should know.
      source: the file read.
      dtypes: types of the tensors read, most frequent first.
      taken: the set that was read, "model", "ema" or "discriminator".
      encoded_by: fingerprint of the encoder whose codes or latents it was trained on; "" where that
        is not known.
      class_names: in the order of the labels; empty where they are not known.
    """

    kind: str
    config: Any
    params: dict[str, Any]
    report: mapping.Report
    notices: list[str]
    source: str
    dtypes: tuple[str, ...]
    taken: Weights = "model"
    encoded_by: str = ""
    class_names: tuple[str, ...] = ()


def read(
    name: str | None,
    *paths: str | os.PathLike[str],
    params: Mapping[str, Any] | None = None,
    classes: str | None = None,
    weights: Weights | None = None,
    scan: bool | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    progress: Callable[[list], Iterable] = iter,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Reads a network from published files.

    Args:
      name: key of `registry.NETWORKS`; None: recognised by the tensors.
      paths: what `read_checkpoint` takes; several files are read as one.
      params: nested arrays or shapes that are wanted, see `place`. Default: those of the
        configuration that the files tell, to which `scan` and what follows it belong.
      classes: with `params`, see `place`.
      weights: "model" or "ema"; default what the published evaluation takes.
      scan: layout of the parameters; default that of the configuration.
      allow_missing: initialise a parameter that has no tensor.
      allow_unused: leave out tensors that belong to no parameter.
      progress: wraps the list of what is to be read.
      overrides: fields of the configuration, by name.

    Raises:
      CheckpointError: nothing readable there, another network, a contradiction between tensors,
        configuration and overrides, a tensor that is missing, unused or of another shape.
    """

    def evaluated(names: Collection[str]) -> Weights:
        found = name or name_of(names)
        return NETWORKS[found].weights if found else "model"

    def recognise(names: Collection[str]) -> int | None:
        if name and NETWORKS[name].recognise(names):
            return 0
        found = name_of(names)
        return None if found is None else int(bool(name or not NETWORKS[found].describe))

    if name and NETWORKS[name].weights == "discriminator":
        weights = "discriminator"
    files = [read_checkpoint(path, weights or evaluated, recognise) for path in paths]
    tensors = {label: x for file in files for label, x in file.tensors.items()}
    published = {key: value for file in files for key, value in file.config.items()}
    source = " and ".join(file.source for file in files)
    notices = [notice for file in files for notice in file.notices]
    network = check(name, tensors, source, str(published.get("_class_name") or ""))
    config, options = None, {"classes": classes}
    with _said(notices, files[0].taken):
        if params is None:
            config, more = network.infer(tensors, published, overrides or {}, source)
            notices += more
            scan = getattr(config, "scan", True) if scan is None else scan
            params = network.abstract(config, scan=scan)
            options = {"resize": False, "allow_unused": allow_unused, "progress": progress}
            if allow_missing:
                init = network.initialize(config, scan=scan)
                options["initial"] = lambda: jax.jit(init)(jax.random.key(0))
        done = place(network, tensors, params, source, **options)
    return dataclasses.replace(
        done,
        config=config,
        notices=notices + done.notices,
        taken=files[0].taken,
        encoded_by=str(published.get("encoded_by") or ""),
        class_names=_texts(published.get("class_names")),
    )


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; nothing for any other value, which is not of a file written here."""
    is_list = isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
    return tuple(value) if is_list else ()


@contextlib.contextmanager
def _said(notices: Sequence[str], taken: Weights) -> Iterator[None]:
    """Adds to an error what the user should know of the weights that do not fit."""
    try:
        yield
    except CheckpointError as error:
        others = "These are the 'ema' weights; weights='model' reads the others."
        more = [others] if taken == "ema" else []
        raise CheckpointError(" ".join([str(error), *more, *notices])) from error


def place(
    network: Network,
    tensors: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    source: str,
    *,
    resize: bool = True,
    allow_unused: bool = False,
    classes: str | None = None,
    **options: Any,
) -> Loaded:
    """Puts published tensors into the places of `params`.

    Args:
      network: what the tensors are of.
      tensors: published name -> array.
      params: nested arrays or shapes that are wanted.
      source: what messages call the file.
      resize: for training that starts from the file: tables of positions and of tokens are resized
        to `params`, and parameters of the network's `optional` tensors may be absent.
      classes: of the file, one for each class of `params`, as "285,207,new".
      allow_unused, **options: see `mapping.from_published`.

    Raises:
      CheckpointError: a tensor is missing, unused or of another shape.
    """
    table, skipped = network.table, network.skipped
    if network.layout:
        table, skipped = network.layout(tensors, params, source)
    optional: tuple[str, ...] = ()
    if resize:
        if classes:
            tensors = _mapped_classes(table, tensors, params, classes, source)
        tensors, anew = _fitted(table, tensors, params)
        optional = (*network.optional, *anew)
    placed, report = mapping.from_published(
        table,
        tensors,
        params,
        source=source,
        skip=skipped,
        optional=optional,
        allow_unused=allow_unused,
        **options,
    )
    used = {label: tensors[label] for label in report.loaded}
    notices = [f"{source}: {notice}" for notice in check_finite(used)]
    dtypes = collections.Counter(str(x.dtype) for x in used.values()).most_common()
    dtypes = tuple(dtype for dtype, _ in dtypes)
    return Loaded(network.name, None, placed, report, notices, source, dtypes)


def _mapped_classes(
    table: Iterable[mapping.Entry],
    tensors: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    classes: str,
    source: str,
) -> dict[str, np.ndarray]:
    """The tensors with a class table of the classes named; a new class starts as the null class.

    Raises:
      CheckpointError: a class that the file does not have, or not one for each class of `params`.
    """
    mapped, words = dict(tensors), [word.strip() for word in classes.split(",")]
    tables = [entry for entry in table if _CLASSES in entry.paths]
    for name, (rows, _) in mapping.published_shapes(tables, params).items():
        if name not in tensors:
            continue  # An error that `from_published` raises.
        null = len(tensors[name]) - 1
        known = {str(i): i for i in range(null)} | {"new": null}
        wrong = [word for word in words if word not in known]
        if wrong or len(words) != rows - 1:
            raise CheckpointError(
                f"config.init_from.classes={classes} does not fit {source}: "
                + (f"{wrong[0]!r} is no class of it" if wrong else f"{len(words)} are named"),
                expected=f"{rows - 1} words, each a class 0..{null - 1} of the file, or new",
            )
        mapped[name] = np.asarray(tensors[name])[[*(known[word] for word in words), null]]
        logging.info("%s: the classes start as %s of the file", name, classes)
    return mapped


def _fitted(
    table: Iterable[mapping.Entry], tensors: Mapping[str, np.ndarray], params: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors with their tables resized to the grids and numbers of tokens of `params`.

    A class table of other classes is left out: it starts anew. The second result names those.
    """
    fitted, anew = dict(tensors), []
    tables = [entry for entry in table if entry.name.endswith(_TOKENS)]
    for name, (one, rows, width) in mapping.published_shapes(tables, params).items():
        have = tensors[name].shape if name in tensors else ()
        if len(have) == 3 and have[1] != rows and (have[0], have[2]) == (one, width):
            logging.info("%s resized from %d to %d tokens", name, have[1], rows)
            weights = interpolation.antialiased_bilinear_matrix(have[1], rows)
            fitted[name] = np.asarray(weights @ np.asarray(tensors[name], np.float32), np.float32)
    tables = [e for e in table if e.name.endswith(_POSITIONS) or _CLASSES in e.paths]
    for name, (rows, width) in mapping.published_shapes(tables, params).items():
        have = tensors[name].shape if name in tensors else ()
        if len(have) != 2 or have[0] == rows or have[1] != width:
            continue  # Nothing to fit, or an error that `from_published` raises.
        if not name.endswith(_POSITIONS):
            del fitted[name]
            anew.append(name)
            text = "%s starts anew: it has %d classes in the file, %d here"
            logging.info(text, name, have[0] - 1, rows - 1)
        elif math.isqrt(have[0]) ** 2 == have[0]:
            side, whole = math.isqrt(rows), np.asarray(tensors[name], np.float32)
            logging.info("%s resized from %d to %d positions", name, have[0], rows)
            fitted[name] = np.asarray(interpolation.resize_position_table(whole, side, side))
    return fitted, anew


def name_of(tensors: Collection[str]) -> str | None:
    """Returns the name of the first network that recognises these names of tensors, or None."""
    return next((name for name, of in NETWORKS.items() if of.recognise(tensors)), None)


def check(name: str | None, tensors: Collection[str], source: str, class_name: str = "") -> Network:
    """Returns the network that these tensors are of.

    Args:
      name: of the network that is expected; None is any that can be loaded and written.
      tensors: published names.
      source: what messages call the file.
      class_name: what a config.json of diffusers calls the network.

    Raises:
      CheckpointError: they are of another network; the text says of which.
    """
    found = name if name and NETWORKS[name].recognise(tensors) else name_of(tensors)
    network = NETWORKS[found] if found else None
    wanted = [NETWORKS[name]] if name else [n for n in NETWORKS.values() if n.describe]
    if network in wanted:
        return network
    looks = f"looks like a {network.title}" if network else "is of no network known here"
    if class_name and not network:
        looks = f"is of no network known here, its config.json calls it {class_name}"
    remedy = "Check that it is the right file."
    if network and network.task:
        remedy = f"df.load_{found} loads it, config.init_from.model starts training from it."
    elif network and network.used_by:
        remedy = f"It needs no conversion: {network.used_by} can name it."
    if name and NETWORKS[name].files:
        remedy += f" The file expected is published at {WEIGHTS[NETWORKS[name].files[0]].source}."
    raise CheckpointError(
        f"{source}: {looks} (it holds {some(tensors, 3) or 'no tensors'})",
        expected=f"a {' or '.join(n.title for n in wanted)}",
        remedy=remedy,
    )
