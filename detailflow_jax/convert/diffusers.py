"""Autoencoders as folders that diffusers loads: a config.json and a file of safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.writers import folder_for, local_path, save_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write(
    kind: str,
    config: Any,
    params: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a folder for `from_pretrained` of the class that its config.json names.

    Args:
      kind: a name in `registry.NETWORKS`.
      config: of the network.
      params: nested parameters.
      path: a folder to make.
      overwrite: whether such a folder at `path` may be replaced.

    Returns:
      the folder.

    Raises:
      CheckpointError: diffusers has no such network, or something is at `path`.
    """
    network = NETWORKS[kind]
    if network.diffusers is None:
        raise CheckpointError(
            f"a {network.title} is no network of diffusers",
            expected="an autoencoder",
            remedy="Write it in its published layout (df.save_pytorch, convert --to pytorch).",
        )
    table, described = network.diffusers(config, params)
    tensors = mapping.to_published(table, params)
    written = [entry for entry in table if entry.name in tensors]
    tensors |= {name: np.zeros((), np.int64) for name in mapping.counters(written)}
    with folder_for(local_path(path), {Path("config.json"), Path(WEIGHTS)}, overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        save_safetensors(tensors, folder / WEIGHTS)
    return local_path(path)
