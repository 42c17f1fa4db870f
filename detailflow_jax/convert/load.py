"""A network from whatever a path leads to: a run of this project, or a published checkpoint."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from detailflow_jax.convert import mapping, portable, published
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.published import Loaded
from detailflow_jax.convert.registry import NETWORKS, Network
from detailflow_jax.convert.select import Weights
from detailflow_jax.runtime import files
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.config import from_json, read_config
from detailflow_jax.runtime.errors import BucketError, ConfigError, near_names, raised_as


def is_workdir(path: str | os.PathLike[str]) -> bool:
    """Returns whether `path` is the workdir of a training run, or a folder that `convert` made."""
    try:
        return "task" in json.loads(files.read_bytes(files.path(path) / "config.json"))
    except BucketError:
        raise
    except Exception:  # Not there, no JSON, or no path at all, such as a name on the hub.
        return False


_kept: dict[Any, Loaded] | None = None


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within, a network that was read is kept in memory, for `load` to return it again.

    At its start, a run asks an autoencoder for its sizes, its fingerprint and its weights.
    """
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def load(
    kind: str | None,
    path: str | os.PathLike[str],
    *,
    weights: Weights | None = None,
    step: int | None = None,
    scan: bool = True,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> Loaded:
    """Reads a network.

    Args:
      kind: a name in `registry.NETWORKS`; None: recognised by what is there.
      path: a workdir, a folder of `portable`, or what `read_checkpoint` takes.
      weights: "model" or "ema". Default: of a published checkpoint what its evaluation takes
        (a generator's average, the model of others), of a run the average where it keeps one.
      step: of a run, which checkpoint; default the newest complete one.
      scan: layout wanted of the parameters; those of a run come in the layout it has.
      overrides: fields of the configuration, `encoder_num_heads` and `decoder_num_heads`.
      **options: of `published.read`: allow_missing, allow_unused, progress.

    Raises:
      ConfigError: `weights`, `step` or an override that cannot be, or a folder without a config.
      CheckpointError: nothing to load there, or another network; the text says what to do.
    """
    if weights not in (None, "model", "ema"):
        raise ConfigError(f"weights={weights!r}; expected 'model', 'ema' or None")
    overrides, key = overrides or {}, (kind, os.fspath(path), weights, step, scan, *options.items())
    kept = _kept.get(key) if _kept is not None else None
    if kept and all(getattr(kept.config, name, None) == x for name, x in overrides.items()):
        return kept
    written = portable.find(path)
    if step is not None and (written is not None or not is_workdir(path)):
        raise ConfigError(f"step={step} is for the workdir of a run, which {path} is not")
    if written is not None:
        stored = from_json(written, f"{path}/config.json")
        found = _load_own(kind, path, stored, overrides, lambda: portable.read_params(path))
        if weights:
            notice = f"{path}: holds one set of weights; weights={weights!r} takes it too"
            found.notices.append(notice)
    elif is_workdir(path):
        run = read_config(path)
        read = functools.partial(restore_params, path, ema=weights != "model", step=step)
        found = _load_own(kind, path, run, overrides, lambda: (read(), []))
        averages = bool(run.get("ema", {}).get("decay"))
        if averages and weights != "model":
            found = dataclasses.replace(found, taken="ema")
        elif weights == "ema":
            found.notices.append(f"{path}: the run keeps no 'ema' weights; reading 'model'")
    else:
        found = published.read(
            kind, path, weights=weights, scan=scan, overrides=overrides, **options
        )
    if _kept is not None:
        _kept[key] = found
    return found


def _load_own(
    kind: str | None,
    path: str | os.PathLike[str],
    stored: ConfigDict,
    overrides: Mapping[str, Any],
    read: Callable[[], tuple[dict[str, Any], list[str]]],
) -> Loaded:
    """A network of a run: its configuration is `stored`, `read` gives parameters and notices."""
    of = _trained(kind, stored.get("task"), path)
    config = _configured(of, stored, overrides, path)
    params, notices = read()
    scan = getattr(config, "scan", False)
    remedy = "Leave out the override of a size, or check config.json there."
    check_shapes(params, of.abstract(config, scan=scan), str(path), remedy)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    # Those of a tokenizer or autoencoder are only of its images.
    names = stored.get("class_names") if hasattr(config, "num_classes") else None
    return Loaded(
        of.name,
        config,
        params,
        mapping.Report(),
        notices,
        str(path),
        tuple(dtypes),
        encoded_by=str(stored.get("encoded_by") or ""),
        class_names=tuple(names or ()),
    )


def _trained(kind: str | None, task: Any, path: str | os.PathLike[str]) -> Network:
    """The network that a run or portable folder holds; raises CheckpointError for another kind."""
    network, of = NETWORKS.get(task), NETWORKS.get(kind or task)
    if network is not of or not (of and of.from_run):
        raise CheckpointError(
            f"{path} holds a {task}",
            expected=f"a {kind or 'network that is trained here'}",
            remedy=f"Load it with df.load_{task}." if network and network.task else "",
        )
    return of


def _configured(
    of: Network, stored: ConfigDict, overrides: Mapping[str, Any], path: str | os.PathLike[str]
) -> Any:
    """The configuration that the `model` section of a config.json describes."""
    if "model" not in stored:
        raise ConfigError(f"{path}: config.json has no section model")
    try:
        config = of.from_run(stored.model)
    except ConfigError as error:  # Not every ValueError: the function may be a fork's.
        raise ConfigError(f"{path}: {error}") from error
    with raised_as(ConfigError, f"{path}: "):
        return _override(config, overrides)


def load_autoencoder(fields: Any, defaults: Mapping[str, Any] | None = None) -> Loaded:
    """Reads the autoencoder at `fields.path`.

    Args:
      fields: `config.vae`. Of a published file they tell what its tensors cannot; a run knows it.
      defaults: what to take of the latter where the fields are not set.

    Raises: as `load`.
    """
    overrides: dict[str, Any] = {}
    if not is_workdir(fields.path):
        told = {name: fields.get(name) for name in ("scale_factor", "shift_factor", "norm_groups")}
        overrides = {**(defaults or {}), **{k: x for k, x in told.items() if x is not None}}
    return load("vae", fields.path, overrides=overrides)


def check_shapes(params: Any, abstract: Any, source: str, remedy: str) -> None:
    """Raises CheckpointError unless the parameters have the shapes of the configuration."""
    there, here = mapping.flatten(params), mapping.flatten(abstract)
    for name in dict.fromkeys([*here, *there]):
        a, b = (tuple(x[name].shape) if name in x else "absent" for x in (there, here))
        if a != b:
            raise CheckpointError(
                f"{source}: parameter {name} is {a}",
                expected=f"{b} by the configuration",
                remedy=remedy,
            )


def _override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """The configuration with fields replaced, the head counts of both trunks among them."""
    fields = {field.name for field in dataclasses.fields(config)}
    heads = {f"{part}_num_heads": part for part in ("encoder", "decoder") if part in fields}
    for name, value in overrides.items():
        if name in heads:
            trunk = dataclasses.replace(getattr(config, heads[name]), num_heads=value)
            config = dataclasses.replace(config, **{heads[name]: trunk})
        elif name in fields:
            config = dataclasses.replace(config, **{name: value})
        else:
            known = sorted(fields | heads.keys())
            near = ", ".join(near_names(name, known)) or ", ".join(known)
            raise ConfigError(f"unknown override {name!r}; closest names: {near}")
    return config
