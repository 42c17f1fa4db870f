"""A trained network as two files that need no run: config.json and model.safetensors.

Parameters are named by their paths ("decoder/conv_in/kernel") and laid out as in a checkpoint, in
float32. `load` recognises such a folder, here or on the hub.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.folders import open_folder
from detailflow_jax.convert.locate import read_mapping
from detailflow_jax.convert.network import with_scan
from detailflow_jax.convert.readers import check_finite, read_checkpoint
from detailflow_jax.convert.writers import save_safetensors
from detailflow_jax.models import layers
from detailflow_jax.runtime import files

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write(
    folder: Path,
    kind: str,
    config: Any,
    params: Mapping[str, Any],
    encoded_by: str = "",
    class_names: Sequence[str] = (),
) -> None:
    """Writes the two files into a folder that is there.

    Args:
      folder: local.
      kind: a name in `registry.NETWORKS`.
      config: of the network.
      params: nested parameters, scanned or not.
      encoded_by: fingerprint of the encoder that it belongs to.
      class_names: in the order of the labels.
    """
    written = {"task": kind, "model": dataclasses.asdict(with_scan(config, True))}
    written |= known(encoded_by=encoded_by, class_names=list(class_names))
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    flat = mapping.flatten(jax.device_get(layers.stack_layers(params)))
    save_safetensors(flat, folder / WEIGHTS, "np")


def known(**facts: Any) -> dict[str, Any]:
    """Returns those of the facts about a network that are not empty."""
    return {name: value for name, value in facts.items() if value}


def find(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the config.json of such a folder, None for anything else.

    Raises:
      CheckpointError: a hub out of reach, or a config.json that is no JSON.
    """
    text = os.fspath(path)
    if not text.startswith("hf:"):
        # Anything else is of another kind, and what reads that says what is wrong with it.
        with contextlib.suppress(Exception):
            if not (files.path(text) / WEIGHTS).exists():
                return None
    with contextlib.ExitStack() as stack:
        folder, named = open_folder(path, stack)
        if named or not {WEIGHTS, CONFIG} <= {*folder.names}:
            return None
        config = read_mapping(folder.fetch(CONFIG), folder.label(CONFIG), json.loads)
    return config if isinstance(config.get("model"), dict) and "task" in config else None


def read_params(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the nested parameters of such a folder, and what the user should know of them.

    Raises:
      CheckpointError: the file cannot be read, or one name lies under another.
    """
    read = read_checkpoint(path)
    names = sorted(read.tensors)
    if nested := [b for a, b in itertools.pairwise(names) if b.startswith(f"{a}/")]:
        raise CheckpointError(
            f"{read.source}: {nested[0]!r} lies under a tensor", expected="names of parameters"
        )
    flat = {name: np.array(x, np.float32) for name, x in read.tensors.items()}
    notices = [f"{read.source}: {notice}" for notice in check_finite(flat)]
    return traverse_util.unflatten_dict(flat, sep="/"), notices
