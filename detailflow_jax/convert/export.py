"""Networks of this project in the published layout, for the published PyTorch code to load."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.writers import SAFETENSORS, write_pytorch


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
      overwrite: whether a checkpoint at `path` may be replaced.
      progress: wraps the list of what is to be written.

    Raises:
      CheckpointError: see `write_pytorch`.
    """
    network = NETWORKS[kind]
    if network.describe is None:
        raise CheckpointError(f"a {network.title} is read only", remedy="Keep its published file.")
    tensors = mapping.to_published(network.table, params)
    left_out = [name for name in tensors if name.startswith(network.skipped)]
    # In the published orientation and row-major, the only copy made of what is transposed.
    written = [name for name in tensors if name not in left_out]
    weights = {name: np.ascontiguousarray(tensors.pop(name)) for name in progress(written)}
    buffers = network.buffers(config)
    both, extra, notices = network.describe(config)
    state = weights | buffers
    average = network.weights == "ema" and not str(path).endswith(SAFETENSORS)
    path = write_pytorch(
        state,
        path,
        both,
        more={network.ema_key: state} if average else {},
        extra_yaml=extra,
        name=network.file_name(config),
        overwrite=overwrite,
    )
    return Exported(path, written, list(buffers), left_out, notices)
