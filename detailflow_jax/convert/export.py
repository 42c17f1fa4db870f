"""Networks of this project in the published layout, for the published PyTorch code to load."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detailflow_jax.convert import mapping, portable, published
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.load import is_workdir, load
from detailflow_jax.convert.readers import read_checkpoint
from detailflow_jax.convert.registry import NETWORKS, Network
from detailflow_jax.convert.tables import discriminator
from detailflow_jax.convert.writers import SAFETENSORS, write_pytorch
from detailflow_jax.runtime.checkpoint import restore_field
from detailflow_jax.runtime.errors import UserError

KEYS = ("ema", "discriminator")
"""What a PyTorch file may hold besides "model"."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      path: the folder or file.
      written: published names of the weights.
      buffers: names of the buffers that strict loading asks for besides.
      left_out: published names of parameters that only training uses.
      notices: what the user should know.
    """

    path: Path
    written: list[str]
    buffers: list[str]
    left_out: list[str]
    notices: list[str]


def export(
    kind: str,
    config: Any,
    params: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    bare: bool = False,
    keys: Collection[str] = (),
    source: str = "",
    encoded_by: str = "",
    class_names: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> Exported:
    """Writes a network as the published code loads it, with `strict=True`.

    The names are exactly those of the published network without its frozen teacher and its
    projection for alignment, which are for training only. Where the published evaluation reads an
    average, the weights are under its name as well as "model" (once in the file).

    Args:
      kind: a name in `registry.NETWORKS`.
      config: of the network.
      params: nested parameters, scanned or not; those in the host's memory are not copied.
      path: see `write_pytorch`.
      bare: write a state dict without a key around it, as FlowAR's `eval.py` reads it.
      keys: what a PyTorch file holds besides "model": "ema", the average of the weights, where
        `source` keeps one beside the raw weights, which are then under "model"; else the same
        weights (once in the file). "discriminator", the trained part of that in `source`.
      source: the run or published file that the network was read from.
      encoded_by: fingerprint of the encoder that it belongs to, for `config.yaml`.
      class_names: in the order of the labels, for the same.
      overwrite: whether a checkpoint at `path` may be replaced.
      progress: wraps the list of what is to be written.

    Raises:
      CheckpointError: see `write_pytorch`; or unknown `keys`, or a discriminator that is not there.
    """
    network = NETWORKS[kind]
    if network.describe is None:
        raise CheckpointError(f"a {network.title} is read only", remedy="Keep its published file.")
    if unknown := [key for key in keys if key not in KEYS]:
        raise CheckpointError(f"keys={unknown[0]!r}", expected=f"one of {', '.join(KEYS)}")
    if bare and keys:
        raise CheckpointError(
            f"a bare state dict has no keys such as {', '.join(keys)}", remedy="Leave out one."
        )
    both = _both_sets(network, params, source) if "ema" in keys else None
    params, average = both or (params, None)
    buffers = network.buffers(config)
    described, extra, notices = network.describe(config)

    def published_state(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        tensors = mapping.to_published(network.table, params)
        names = [name for name in tensors if not name.startswith(network.skipped)]
        # In the published orientation and row-major, the only copy made of what is transposed.
        return {name: np.ascontiguousarray(tensors[name]) for name in progress(names)} | buffers

    state = published_state(params)
    more: dict[str, Mapping[str, np.ndarray]] = {}
    single = bare or str(path).endswith(SAFETENSORS)
    if "ema" in keys or (network.weights == "ema" and not single):
        more[network.ema_key] = state if average is None else published_state(average)
        if "ema" in keys and average is None:
            notices = [*notices, f"{network.ema_key!r} holds the same weights as 'model'"]
    if "discriminator" in keys:
        more["discriminator"] = _discriminator(source)
    path = write_pytorch(
        state,
        path,
        described,
        wrap=None if bare else "model",
        more=more,
        extra_yaml=extra | portable.known(encoded_by=encoded_by, class_names=list(class_names)),
        name=network.file_name(config),
        overwrite=overwrite,
    )
    if path.suffix != SAFETENSORS:
        notices = notices + _unwritten(network, bare, more)
    names = mapping.published_shapes(network.table, params)
    return Exported(
        path,
        [name for name in state if name not in buffers],
        list(buffers),
        [name for name in names if name not in state],
        notices,
    )


def _both_sets(
    network: Network, params: Mapping[str, Any], source: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Raw weights and their average from the file or run that parameters were read from.

    None if it does not keep both, or if the parameters are neither: they were changed since.
    """
    found: dict[str, Any] = {}
    for kind in ("model", "ema"):
        try:
            if is_workdir(source):
                read = load(network.name, source, weights=kind)
            else:
                read = published.read(network.name, source, params=params, weights=kind)
        except UserError:  # There is no source, or none any more.
            return None
        if read.taken != kind:
            return None
        found[kind] = read.params
    given = mapping.to_published(network.table, params)
    for one in found.values():
        theirs = mapping.to_published(network.table, one)
        if all(np.array_equal(given[name], theirs.get(name)) for name in given):
            return found["model"], found["ema"]
    return None


def _unwritten(network: Network, bare: bool, keys: Collection[str]) -> list[str]:
    """Notices of what the published scripts read and this file has only on request."""
    reads = {key: (f"the key {key!r}", f"it with --keys {key}") for key in network.wants}
    reads["bare"] = "a bare state dict", "one with --bare"
    there = {*keys, "bare"} if bare else keys
    return [
        f"the published {script} reads {reads[key][0]}: write {reads[key][1]}"
        for key, script in network.wants.items()
        if key not in there
    ]


def _discriminator(source: str) -> Mapping[str, np.ndarray]:
    """The trained part of the discriminator of a run or of a published training checkpoint."""
    if is_workdir(source):
        extra = restore_field(source, ("extra", "params"))  # No extra: there is no discriminator.
        if trained := extra.get("discriminator"):
            variables = {"params": trained["params"], **trained["state"]}
            return discriminator.published_state(variables)
    elif source:
        known = NETWORKS["discriminator"].recognise
        found = read_checkpoint(source, "discriminator", lambda names: 0 if known(names) else None)
        if found.taken == "discriminator":
            return found.tensors
    raise CheckpointError(
        f"{source or 'the model'}: holds no discriminator",
        expected="a run with config.losses.adversarial, or a published training checkpoint",
        remedy="Leave out the key discriminator.",
    )
