"""The FID Inception in torch-fidelity's names: `weights-inception-2015-12-05-6726825d.pth`."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, conv, linear
from detailflow_jax.convert.readers import check_finite, read_checkpoint
from detailflow_jax.models.inception import MIXED, STEM, Inception

SIGNS = ("Mixed_7c.branch3x3dbl_3b.conv.weight", "fc.weight")
"""Names by which such a checkpoint is known."""


def _leaves(steps: Any) -> Iterator[str]:
    """Names of the convolutions in a part of `MIXED` or `STEM`, in order."""
    for step in steps:
        if isinstance(step, tuple) and isinstance(step[0], str) and len(step) > 2:
            yield step[0]
        elif isinstance(step, tuple):
            yield from _leaves(step)


def _conv_norm(name: str, path: str) -> Iterator[Entry]:
    yield from conv(f"{name}.conv", f"{path}/conv", use_bias=False)
    norm = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for theirs, ours in norm.items():
        yield Entry(f"{name}.bn.{theirs}", (f"{path}/{ours}",))


def _table() -> Iterator[Entry]:
    for name in _leaves(STEM):
        yield from _conv_norm(name, name)
    for block, branches in MIXED.items():
        for name in _leaves(branches):
            yield from _conv_norm(f"{block}.{name}", f"{block}/{name}")
    yield from linear("fc", "logits")


TABLE = tuple(_table())

COUNTERS = tuple(
    entry.name.replace("running_mean", "num_batches_tracked")
    for entry in TABLE
    if entry.name.endswith("running_mean")
)
"""Batch counters in the file that nothing needs."""


def abstract() -> dict[str, Any]:
    """Inception's parameters as shapes."""
    example = jnp.zeros((1, 299, 299, 3))
    return jax.eval_shape(Inception().init, jax.random.key(0), example)["params"]


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """Inception's parameters (nested, float32) and notices.

    Raises:
      CheckpointError: a file that cannot be read or is another network, such as torchvision's
        InceptionV3, whose numbers are no FID.
    """
    read = read_checkpoint(path)
    if not all(name in read.tensors for name in SIGNS):
        raise CheckpointError(
            f"{read.source}: not the Inception of FID (it holds {', '.join(list(read.tensors)[:3])}"
            ", ...)",
            expected="weights-inception-2015-12-05-6726825d.pth",
            remedy="torch-fidelity publishes it with its release v0.2.0.",
        )
    params, report = mapping.from_published(
        TABLE, read.tensors, abstract(), source=read.source, skip=COUNTERS, allow_unused=False
    )
    bad = check_finite({name: read.tensors[name] for name in report.loaded})
    return params, [*read.notices, *(f"{read.source}: {notice}" for notice in bad)]
