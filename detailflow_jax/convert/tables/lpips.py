"""LPIPS weights, which are published in parts and under three sets of names.

    VGG16    features.N            torchvision's `vgg16-397923af.pth`
             net.sliceK.N          a whole LPIPS of the `lpips` package and taming-transformers
             net.sliceK.M          a whole LPIPS of DetailFlow: M counts from 0 in every slice
    weights  linK.model.1.weight   in a whole LPIPS, or alone: `vgg.pth` of the first two

The `lpips` package repeats its weights under `lins.K`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from detailflow_jax.convert.errors import CheckpointError, some
from detailflow_jax.convert.mapping import Entry, conv
from detailflow_jax.convert.network import Layout, Network, image
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
    """Returns the table of LPIPS; `form` is one of FORMS and names VGG16."""
    vgg = (conv(name, f"vgg/conv_{i}") for i, name in enumerate(_vgg_names(form)))
    linear = (
        Entry(f"lin{i}.model.1.weight", (f"linear_{i}",), permute=(2, 3, 1, 0))
        for i in range(len(STAGES))
    )
    return (*(entry for entries in vgg for entry in entries), *linear)


def find(tensors: Collection[str]) -> str | None:
    """Returns the form in which tensors hold VGG16's convolutions, or None."""
    # The last convolution is named otherwise in each of the three.
    return next((f for f in FORMS if f"{list(_vgg_names(f))[-1]}.weight" in tensors), None)


def recognise(tensors: Collection[str]) -> bool:
    """Returns whether these tensors are of LPIPS or of one of its parts."""
    return find(tensors) is not None or "lin0.model.1.weight" in tensors


def layout(tensors: Mapping[str, Any], params: Mapping[str, Any], source: str) -> Layout:
    """See `Network.layout`.

    Raises:
      CheckpointError: VGG16 or the weights over its features are not among the tensors.
    """
    del params
    form = find(tensors)
    if form is None:
        raise CheckpointError(
            f"{source}: VGG16 is not in it (it holds {some(tensors, 3)})",
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
    return table(form), SKIPPED


NETWORK = Network(
    name="lpips",
    title="perceptual network (LPIPS)",
    recognise=recognise,
    module=lambda config: LPIPS(),
    example=lambda config: (image(SMALLEST), image(SMALLEST)),
    layout=layout,
    files=("vgg16", "lpips"),
)
