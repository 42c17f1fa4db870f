"""The FID Inception in torch-fidelity's names: `weights-inception-2015-12-05-6726825d.pth`."""

from collections.abc import Iterator
from typing import Any

from detailflow_jax.convert.mapping import Entry, conv, counters, linear
from detailflow_jax.convert.network import Network, image
from detailflow_jax.models.inception import MIXED, STEM, Inception

_SIGNS = {"Mixed_7c.branch3x3dbl_3b.conv.weight", "fc.weight"}


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

COUNTERS = counters(TABLE)

NETWORK = Network(
    name="inception",
    title="feature network of FID (Inception)",
    recognise=_SIGNS.issubset,
    module=lambda config: Inception(),
    example=lambda config: (image(299),),
    table=TABLE,
    skipped=COUNTERS,
    files=("inception",),
)
