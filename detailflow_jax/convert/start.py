"""Training that starts from weights: which file goes into which part of a state.

    config.init_from.model     a whole network: a run of this project or a published checkpoint;
                               PATH#model takes the raw weights, PATH#ema their average
    config.init_from.classes   classes of that network, one for each class here, as 285,207,new
    config.init_from.encoder   SigLIP2 for the tokenizer's encoder: its first layers
    config.init_from.discriminator   the discriminator's trained part
    config.teacher.path        SigLIP2 for the frozen teacher of the alignment loss
    config.vae.path            the frozen autoencoder of FlowAR: a run or a published checkpoint
    config.losses.perceptual.path   LPIPS of the perceptual loss, and `linear` beside VGG16 alone
    config.discriminator.path  the frozen DINO of the discriminator

A generator with a flow head gets the codebook from the folder of its codes.

LPIPS and DINO have usual places, which need not be named (`detailflow_jax.runtime.weights`).
SigLIP2 is a folder, file or hub name in Hugging Face's format, or a published training checkpoint
of a tokenizer, which has its teacher inside. Position tables of another grid are resized as the
network resizes them (antialiased bilinear), a tokenizer's tables of its tokens in the same way
along their order; layers beyond the depth wanted are left out.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from detailflow_jax import data
from detailflow_jax.convert import mapping, published
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.fingerprint import encoder_fingerprint
from detailflow_jax.convert.load import check_shapes, is_workdir, load, load_autoencoder
from detailflow_jax.convert.published import Loaded
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.runtime import weights
from detailflow_jax.runtime.config import read_config
from detailflow_jax.tasks import TrainState
from detailflow_jax.tasks.losses import Frozen


def load_into(
    config: Any, state: TrainState, frozen: Iterable[Frozen], *, fresh: bool
) -> TrainState:
    """Returns the state with the weights that the configuration names in their places.

    Args:
      config: of the run; `init_from` and `teacher` may be absent.
      state: as created or restored, placed on its mesh; every array keeps its placement.
      frozen: the task's, networks of its loss terms.
      fresh: whether no checkpoint was restored. If one was, only the frozen networks are read,
        which are no part of a checkpoint.

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
    if config.get("task") == "generator" and config.model.get("head") == "flow":
        if model:
            raise CheckpointError(
                f"config.init_from.model={model}: a generator with a flow head starts from scratch",
                remedy="Leave it out; a run goes on with the same --workdir.",
            )
        _, _, folder = config.data.source.partition(":")
        if fresh:
            state = _with_params(state, {"codebook": data.CodeSource.read_codebook(folder)})
    if fresh and model:
        whole = read_whole(config.task, model, state.params, start.get("classes"))
        state = _with_params(state, whole)
    if fresh and encoder:
        trunk = _told(published.read("siglip2", encoder, params=state.params["encoder"]["trunk"]))
        state = _with_params(state, {"encoder": {"trunk": trunk}})
    new, old = {}, state.frozen
    for network in frozen:
        if not network.random:
            params = old[network.name]
            new[network.name] = _placed(params, read_frozen(network, params))
    if "vae" in old and config.vae.get("path"):
        new["vae"] = _placed(old["vae"], read_vae(config.vae, old["vae"]))
    if new:
        state = state.replace(frozen=old | new)
    trained = start.get("discriminator")
    if fresh and trained and "discriminator" in state.extra:
        state = _with_discriminator(trained, state)
    return state


def read_whole(
    kind: str, path: str, params: Mapping[str, Any], classes: str | None = None
) -> dict[str, Any]:
    """Returns the parameters of a whole network, but for projections that the file lacks.

    Args:
      kind: name of the network.
      path: a run or a published checkpoint; "#model" or "#ema" behind it chooses the weights.
      params: nested arrays or shapes that are wanted.
      classes: see `published.place`.

    Raises:
      CheckpointError: it cannot be read, or is another network.
    """
    path, choice = path.rsplit("#", 1) if path.endswith(("#model", "#ema")) else (path, None)
    if is_workdir(path):
        run = load(kind, path, weights=choice)
        tensors = mapping.to_published(NETWORKS[kind].table, run.params)
        read = published.place(NETWORKS[kind], tensors, params, path, classes=classes)
        read = dataclasses.replace(read, taken=run.taken, notices=run.notices + read.notices)
    else:
        read = published.read(kind, path, params=params, weights=choice, classes=classes)
    names = {"ema": "the average of the weights (ema)", "model": "the raw weights (model)"}
    logging.info("config.init_from.model: %s of %s", names[read.taken], path)
    return _told(read)


def check_encoder(config: Any, encoded_by: str, workdir: str | os.PathLike[str]) -> str:
    """Returns the fingerprint of the encoder that made a run's codes or latents; "" if unknown.

    Args:
      config: of the run.
      encoded_by: what the data say.
      workdir: of the run, which may have begun before.

    Raises:
      CheckpointError: what `config.vae.path` or `config.score.decoder` names did not make the codes
        or latents, or the run has begun on those of another encoder.
    """
    source = (config.get("data") or {}).get("source", "")
    if (config.get("vae") or {}).get("path"):
        found = load_autoencoder(config.vae)
        _check_made(found, encoded_by, f"config.vae.path={config.vae.path}", source)
        encoded_by = encoder_fingerprint("vae", found.params)
    score = config.get("score") or {}
    if encoded_by and score.get("every") and score.get("decoder"):
        found = load({"generator": "tokenizer"}.get(config.task, "vae"), score.decoder)
        _check_made(found, encoded_by, f"config.score.decoder={score.decoder}", source)
    before = read_config(workdir).get("encoded_by", "") if is_workdir(workdir) else ""
    if before and encoded_by and before != encoded_by:
        raise CheckpointError(
            f"{workdir} was started on the codes or latents of another encoder than that of the "
            f"data, {source}",
            remedy="Give the run another --workdir, or the data of its own encoder.",
        )
    return encoded_by or before


def _check_made(decoder: Loaded, encoded_by: str, field: str, source: str) -> None:
    if encoded_by and encoder_fingerprint(decoder.kind, decoder.params) != encoded_by:
        raise CheckpointError(
            f"{field} is not the {NETWORKS[decoder.kind].title} that made the codes or latents of "
            f"{source}",
            expected="the same one, or one whose decoder alone was trained on",
        )


def read_frozen(frozen: Frozen, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a frozen network, from the files named or the usual ones.

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
        return _told(published.read(frozen.network, *files, params=params))
    told = {name: getattr(frozen.config, name) for name in frozen.untold}
    read = published.read(frozen.network, *files, overrides=told)
    _check_described(read.source, read.config, dataclasses.asdict(frozen.config), frozen.described)
    return _told(read)


def read_vae(fields: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the autoencoder at `fields.path`, a run or a published file.

    Raises:
      CheckpointError: it is not there, or not the one that the other fields of `config.vae`
        describe.
    """
    found = load_autoencoder(fields)
    _check_described(fields.path, found.config, fields, "config.vae")
    check_shapes(found.params, params, fields.path, "Set the fields of config.vae as it has them.")
    return _told(found)


def _check_described(source: str, found: Any, fields: Mapping[str, Any], section: str) -> None:
    """Raises CheckpointError unless a configuration has the values of a section's fields."""
    for name, value in fields.items():
        there = getattr(found, name, value)
        if value is None:
            continue
        a, b = (list(x) if isinstance(x, tuple) else x for x in (there, value))
        if a != b:
            raise CheckpointError(
                f"{source}: {name} is {a}, {section}.{name} is {value}",
                expected=f"a network as {section} describes it",
                remedy=f"Set {section}.{name}, or name another file.",
            )


def _with_discriminator(path: str, state: TrainState) -> TrainState:
    """The state with the trained part of a published discriminator."""
    disc_state = state.extra["discriminator"]
    variables = {"params": disc_state["params"], **disc_state["state"]}
    read = dict(_told(published.read("discriminator", path, params=variables)))
    disc_state = disc_state | {
        "params": _placed(disc_state["params"], read.pop("params")),
        "state": _placed(disc_state["state"], read),
    }
    return state.replace(extra=state.extra | {"discriminator": disc_state})


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


def _told(read: Loaded) -> dict[str, Any]:
    """The parameters; logs the notices about them first."""
    for notice in read.notices:
        logging.warning("%s", notice)
    loaded, skipped = len(read.report.loaded), len(read.report.skipped)
    if loaded:  # A run of this project has its parameters as they are.
        logging.info("%s: %d tensors read, %d left out by design", read.source, loaded, skipped)
    return read.params
