"""LPIPS weights, which are published in parts and under three sets of names.

    VGG16    features.N            torchvision's `vgg16-397923af.pth`
             net.sliceK.N          a whole LPIPS of the `lpips` package and taming-transformers
             net.sliceK.M          a whole LPIPS of DetailFlow: M counts from 0 in every slice
    weights  linK.model.1.weight   in a whole LPIPS, or alone: `vgg.pth` of the first two

The `lpips` package repeats its weights under `lins.K`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.convert import mapping
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, conv
from detailflow_jax.convert.readers import check_finite, read_checkpoint
from detailflow_jax.models.lpips import LPIPS, SMALLEST, STAGES

SKIPPED = ("scaling_layer.", "lins.", "classifier.")
"""Constants, repetitions, and the head of VGG16."""

_STEMS = {
    "torchvision": "features.{at}",
    "lpips": "net.slice{stage}.{at}",
    "detailflow": "net.slice{stage}.{within}",
}
FORMS = tuple(_STEMS)


def _vgg_names(form: str) -> Iterator[str]:
    """Published names of VGG16's convolutions, in order."""
    at = 0
    for stage, widths in enumerate(STAGES):
        first = at
        at += stage > 0  # the pool
        for _ in widths:
            yield _STEMS[form].format(stage=stage + 1, at=at, within=at - first)
            at += 2  # a convolution and its activation


def table(form: str) -> tuple[Entry, ...]:
    """All of LPIPS; `form` is one of FORMS and names VGG16."""
    vgg = (conv(name, f"vgg/conv_{i}") for i, name in enumerate(_vgg_names(form)))
    linear = (
        Entry(f"lin{i}.model.1.weight", (f"linear_{i}",), permute=(2, 3, 1, 0))
        for i in range(len(STAGES))
    )
    return (*(entry for entries in vgg for entry in entries), *linear)


def find(tensors: Iterable[str]) -> str | None:
    """The form in which tensors hold VGG16's convolutions, or None."""
    names = set(tensors)
    # The last convolution is named otherwise in each of the three.
    return next((f for f in FORMS if f"{list(_vgg_names(f))[-1]}.weight" in names), None)


def abstract() -> dict[str, Any]:
    """LPIPS's parameters as shapes."""
    example = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    return jax.eval_shape(LPIPS().init, jax.random.key(0), example, example)["params"]


def from_tensors(
    tensors: Mapping[str, np.ndarray], source: str
) -> tuple[dict[str, Any], mapping.Report]:
    """Parameters of LPIPS from its published tensors, in any form.

    Raises:
      CheckpointError: VGG16 or the weights over its features are not among them, or are damaged.
    """
    form = find(tensors)
    if form is None:
        raise CheckpointError(
            f"{source}: VGG16 is not in it (it holds {', '.join(list(tensors)[:3])}, ...)",
            expected="features.0.weight ... of torchvision or a whole LPIPS",
            remedy="A file called vgg.pth has the weights over VGG16's features only: name "
            "torchvision's vgg16-397923af.pth beside it.",
        )
    if "lin0.model.1.weight" not in tensors:
        raise CheckpointError(
            f"{source}: the weights over VGG16's features are not in it",
            expected="lin0.model.1.weight ... lin4.model.1.weight",
            remedy="Name LPIPS's vgg.pth beside torchvision's VGG16.",
        )
    return mapping.from_published(
        table(form), tensors, abstract(), source=source, skip=SKIPPED, allow_unused=False
    )


def load(*paths: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """Parameters of LPIPS and notices, from one whole file or from VGG16 and the weights apart.

    Args:
      paths: what `read_checkpoint` takes; in any order.

    Raises:
      CheckpointError: a file cannot be read, or together they are no LPIPS.
    """
    tensors: dict[str, np.ndarray] = {}
    notices: list[str] = []
    sources = []
    for path in paths:
        read = read_checkpoint(path)
        tensors |= read.tensors
        notices += read.notices
        sources.append(read.source)
    source = " and ".join(sources)
    params, report = from_tensors(tensors, source)
    bad = check_finite({name: tensors[name] for name in report.loaded})
    return params, [*notices, *(f"{source}: {notice}" for notice in bad)]
