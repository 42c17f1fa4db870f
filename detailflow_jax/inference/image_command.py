"""What the commands on given images share: their arguments, reading, and what they write.

Each writes one PNG per result, `results.png` (a row per image: the image, then its results) and
`results.json` (the models with their fingerprints, and the arguments).

Shapes: B images, R full image side.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8

from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.data.images import Picture, decode_picture, read_file
from detailflow_jax.data.transforms import center_crop
from detailflow_jax.inference import api
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.generate import labels_of, write_origin
from detailflow_jax.inference.models import Model
from detailflow_jax.runtime import files, pictures
from detailflow_jax.runtime.command import make_parser, number, seed, whole
from detailflow_jax.runtime.errors import reported

Results = Float32[np.ndarray, "B R R c"]


def parser_of(name: str, description: str, decoder: str, model: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all of these commands have."""
    parser = make_parser(name, description)
    add = parser.add_argument
    add(f"--{decoder}", required=True, help=f"what df.load_{decoder} takes, such as a workdir")
    add(f"--{model}", required=True, help=f"what df.load_{model} takes, such as a workdir")
    add("--image", required=True, nargs="+", metavar="FILE", help="images, cut to a square")
    add("--label", help="class of the results, a number or a name; without it: no class")
    add("--count", type=whole(1), default=4, help="results per image")
    add("--seed", type=seed, default=0, help="result i depends on the seed and i alone")
    guidance = 2.4 if model == "flowar" else 1.5
    add(
        "--cfg_scale",
        type=number(1),
        default=guidance,
        help="guidance >= 1; not used without a label",
    )
    add("--out", required=True, help="folder, also gs://..., for the results")
    return parser


def picture(path: str) -> Picture:
    """The image in a file.

    Raises:
      InputError: there is none.
    """
    try:
        return decode_picture(read_file(path), path)
    except (UnreadableImage, OSError) as error:
        raise InputError(f"{error}: expected an image file") from error


def read_images(paths: Sequence[str], side: int) -> UInt8[np.ndarray, "B {side} {side} 3"]:
    """Image files, their centre at `side` px.

    Raises:
      InputError: a file that is no image.
    """
    return np.stack([center_crop(picture(path), side) for path in paths])


def repeated(
    images: Shaped[np.ndarray, "b h w c"], args: argparse.Namespace, model: Model
) -> tuple[Shaped[np.ndarray, "B h w c"], Int[np.ndarray, " B"] | None, dict[str, float]]:
    """Each image `count` times, the labels of all, and the settings of sampling.

    Raises:
      InputError: not one label.
    """
    images, labels = images.repeat(args.count, axis=0), None
    if args.label is not None:
        label = labels_of(args.label, model)
        if len(label) != 1:
            raise InputError(f"--label {args.label}: expected one class")
        labels = np.full(len(images), label[0])
    return images, labels, {"cfg_scale": args.cfg_scale}


def write_results(
    args: argparse.Namespace,
    models: Sequence[Model],
    shown: Mapping[str, UInt8[np.ndarray, "b R R 3"]],
    results: Results,
) -> None:
    """Writes the results; `shown` is what stands before them, by caption."""
    out, images = files.path(args.out), api.to_uint8(results)
    files.make_folder(out)
    rows = images.reshape(-1, args.count, *images.shape[1:])
    cells = np.concatenate([*(x[:, None] for x in shown.values()), rows], axis=1)
    captions = [*shown, *map(str, range(args.count))]
    grid = pictures.grid(
        cells.reshape(-1, *images.shape[1:]),
        columns=len(captions),
        scale=max(1, 96 // images.shape[1]),
        column_captions=captions,
    )
    pictures.save_png(out / "results.png", grid)
    for path, row in zip(args.image, rows, strict=True):
        stem = os.path.splitext(os.path.basename(path))[0]
        for i, image in enumerate(row):
            pictures.save_png(out / f"{stem}_{i}.png", image)
    write_origin(out / "results.json", models, args)
    print(f"{len(images)} images of {images.shape[1]} px in {args.out}")


@reported
def run(function: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """The exit code of a command; an error of the user is told in one line."""
    files.path(args.out)  # An address that cannot be written to shows before the sampling.
    function(args)
    return 0
