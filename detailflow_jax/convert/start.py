"""Training that starts from weights: which file goes into which part of a state.

    config.init_from.model     a whole network: a run of this project or a published checkpoint
    config.init_from.encoder   SigLIP2 for the tokenizer's encoder: its first layers
    config.teacher.path        SigLIP2 for the frozen teacher of the alignment loss
    config.vae.path            the frozen autoencoder of FlowAR: a run or a published checkpoint
    config.losses.perceptual.path   LPIPS of the perceptual loss, and `linear` beside VGG16 alone
    config.discriminator.path  the frozen DINO of the discriminator
    config.init_from.discriminator   the discriminator's trained part

LPIPS and DINO have usual places, which need not be named (`detailflow_jax.runtime.weights`).
SigLIP2 is a folder, file or hub name in Hugging Face's format, or a published training checkpoint
of a tokenizer, which has its teacher inside. Position tables of another grid are resized as the
network resizes them (antialiased bilinear); layers beyond the depth wanted are left out.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from detailflow_jax.convert import mapping, published
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.load import is_workdir, load
from detailflow_jax.convert.readers import check_finite, read_checkpoint
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.tables import tokenizer
from detailflow_jax.ops import interpolation
from detailflow_jax.runtime import weights
from detailflow_jax.tasks import TrainState
from detailflow_jax.tasks.losses import Frozen

Tensors = Mapping[str, np.ndarray]


def load_into(
    config: Any, state: TrainState, frozen: Iterable[Frozen], *, fresh: bool
) -> TrainState:
    """The state with the weights that the configuration names in their places.

    Args:
      config: of the run; `init_from` and `teacher` may be absent.
      state: as created or restored, placed on its mesh; every array keeps its placement.
      frozen: the task's, networks of its loss terms.
      fresh: whether no checkpoint was restored; else `init_from` has had its effect long ago,
        and only what is no part of a checkpoint, the frozen networks, is read.

    Raises:
      CheckpointError: a file that cannot be read, is of another network or size, or two files for
        the same parameters.
    """
    start = config.get("init_from") or {}
    model, encoder = start.get("model"), start.get("encoder")
    if model and encoder:
        raise CheckpointError(
            f"config.init_from names both model={model} and encoder={encoder}",
            expected="one of them: a whole model has an encoder",
        )
    if fresh and model:
        state = _with_params(state, read_whole(config.task, model, state.params))
    if fresh and encoder:
        trunk = read_siglip(encoder, state.params["encoder"]["trunk"])
        state = _with_params(state, {"encoder": {"trunk": trunk}})
    for network in frozen:
        if not network.random:
            old = state.frozen[network.name]
            params = _placed(old, read_frozen(network, old))
            state = state.replace(frozen=state.frozen | {network.name: params})
    if "vae" in state.frozen and config.vae.get("path"):
        vae = _placed(state.frozen["vae"], read_vae(config.vae, state.frozen["vae"]))
        state = state.replace(frozen=state.frozen | {"vae": vae})
    trained = start.get("discriminator")
    if fresh and trained and "discriminator" in state.extra:
        state = _with_discriminator(trained, state)
    return state


def read_frozen(frozen: Frozen, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a frozen network of a loss term, from the files named or the usual ones.

    Raises:
      WeightsError: a file is not there; the text says where people get it.
      CheckpointError: it is not the network that the configuration describes.
    """
    files = [
        weights.locate(need.weights, path=path, field=need.field, without=need.without)
        if need.automatic
        else path
        for need, path in frozen.files
    ]
    if frozen.config is None:
        read = published.read(frozen.network, *files, params=params)
        _tell(read.notices)
        return read.params
    told = {name: getattr(frozen.config, name) for name in frozen.untold}
    read = published.read(frozen.network, *files, overrides=told)
    _tell(read.notices)
    for name, value in dataclasses.asdict(frozen.config).items():
        if (found := getattr(read.config, name)) != value:
            raise CheckpointError(
                f"{read.source}: {name} is {found}, {frozen.described}.{name} is {value}",
                expected=f"a network as {frozen.described} describes it",
            )
    return read.params


def _with_discriminator(path: str, state: TrainState) -> TrainState:
    """The state with the trained part of a published discriminator."""
    disc_state = state.extra["discriminator"]
    variables = {"params": disc_state["params"], **disc_state["state"]}
    read = published.read("discriminator", path, params=variables)
    _tell(read.notices)
    variables = dict(read.params)
    disc_state = disc_state | {
        "params": _placed(disc_state["params"], variables.pop("params")),
        "state": _placed(disc_state["state"], variables),
    }
    return state.replace(extra=state.extra | {"discriminator": disc_state})


def read_vae(fields: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the autoencoder at `fields.path`, a run or a published checkpoint.

    Raises:
      CheckpointError: it is not there, or not the one that the other fields of `config.vae`
        describe.
    """
    overrides = {} if is_workdir(fields.path) else {"scale_factor": fields.scale_factor}
    found = load("vae", fields.path, overrides=overrides)
    _tell(found.notices)
    for name, value in fields.items():
        there = getattr(found.config, name, value)
        there = list(there) if isinstance(there, tuple) else there
        if there != (list(value) if isinstance(value, tuple) else value):
            raise CheckpointError(
                f"{fields.path}: {name} is {there}, config.vae.{name} is {value}",
                expected="an autoencoder as config.vae describes it",
                remedy=f"Set config.vae.{name}, or name another file in config.vae.path.",
            )
    have, want = mapping.flatten(found.params), mapping.flatten(params)
    if have.keys() != want.keys():
        differing = sorted(have.keys() ^ want.keys())
        raise CheckpointError(
            f"{fields.path}: parameters {', '.join(differing[:3])}, ... differ from config.vae",
            expected="an autoencoder as config.vae describes it",
        )
    return found.params


def _with_params(state: TrainState, loaded: Mapping[str, Any]) -> TrainState:
    average = state.ema if state.ema is None else _placed(state.ema, loaded)
    return state.replace(params=_placed(state.params, loaded), ema=average)


def _placed(current: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """`current` with the leaves that were loaded, each where the old one was."""
    leaves = mapping.flatten(current)
    for path, array in mapping.flatten(loaded).items():
        old = leaves[path]
        array = np.asarray(array, old.dtype)
        placed = jax.make_array_from_callback(
            old.shape, old.sharding, lambda index, array=array: array[index]
        )
        # On a CPU that may be the host's array itself, which a step must not write into.
        leaves[path] = jnp.copy(placed)
    return traverse_util.unflatten_dict(leaves, sep="/")


def read_whole(kind: str, path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a whole network, but for the projections for alignment that it lacks."""
    network = NETWORKS[kind]
    if is_workdir(path):
        tensors, source = mapping.to_published(network.table, load(kind, path).params), path
    else:
        read = read_checkpoint(path, network.weights)
        _tell(read.notices)
        tensors, source = read.tensors, read.source
    published.check(kind, tensors, source)
    optional = {"align_layers": tokenizer.ALIGNMENT, "repa_layers": tokenizer.REPA}
    absent = tuple(k for k, name in optional.items() if f"{name}0.weight" not in tensors)
    wanted = {k: x for k, x in params.items() if not k.startswith(absent)}
    return _read(
        network.table, _fitted(network.table, tensors, wanted), wanted, source, network.skipped
    )


def read_siglip(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a vision transformer, as deep as `params`."""
    read = published.read("siglip2", path, params=params)
    _tell(read.notices)
    return read.params


def _read(table, tensors: Tensors, params, source: str, skip) -> dict[str, Any]:
    loaded, report = mapping.from_published(
        table, tensors, params, source=source, skip=skip, allow_unused=False
    )
    _tell([f"{source}: {n}" for n in check_finite({k: tensors[k] for k in report.loaded})])
    logging.info(
        "%d tensors from %s, %d left aside by design",
        len(report.loaded),
        source,
        len(report.skipped),
    )
    return loaded


def _tell(notices: list[str]) -> None:
    for notice in notices:
        logging.warning("%s", notice)


def _fitted(table, tensors: Tensors, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors with their position tables resized to the grids of `params`."""
    fitted = dict(tensors)
    for name, (rows, width) in mapping.published_shapes(_position_tables(table), params).items():
        have = tensors[name].shape if name in tensors else ()
        if len(have) != 2 or have[0] == rows or have[1] != width:
            continue  # The right one, or one that cannot be: from_published tells.
        if math.isqrt(have[0]) ** 2 != have[0]:
            continue
        side = math.isqrt(rows)
        logging.info("%s resized from %d to %d positions", name, have[0], rows)
        whole = np.asarray(tensors[name], np.float32)
        fitted[name] = np.asarray(interpolation.resize_position_table(whole, side, side))
    return fitted


def _position_tables(table):
    return [entry for entry in table if entry.name.endswith("position_embedding.weight")]
