"""Images edited by FlowAR: a part painted anew, or surroundings added.

    detailflow edit --vae runs/vae --flowar runs/flowar --image cat.png --box 0.2,0.2,0.8,0.6 \\
        --label dog --out runs/edited
    detailflow edit --vae runs/vae --flowar runs/flowar --image cat.png --outpaint 0.6 \\
        --label cat --out runs/wider
"""

import argparse
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from detailflow_jax.data.transforms import center_crop
from detailflow_jax.inference import api, editing, image_command
from detailflow_jax.inference.errors import InputError
from detailflow_jax.runtime.command import whole

WHITE = 128  # Brighter pixels of a mask are painted anew.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = image_command.parser_of(
        "edit", "Paint a part of an image anew, or its surroundings.", "vae", "flowar"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", help="image file of the same size, white where it is to be new")
    where.add_argument(
        "--box", type=box, help="the new part as left,top,right,bottom, shares of the side"
    )
    where.add_argument("--outpaint", type=inner, help="share of the side that the image takes")
    parser.add_argument("--num_steps", type=whole(1), default=25, help="flow steps")
    return image_command.run(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Edits what the arguments say and writes the results."""
    vae, flowar = api.load_vae(args.vae), api.load_flowar(args.flowar)
    api.check_pair(vae, flowar)
    side = flowar.config.latent_side * vae.config.stride
    images, mask = images_and_mask(args, side)
    rows, labels, settings = image_command.repeated(images, args, flowar)
    settings["num_steps"] = args.num_steps
    results = api.edit(vae, flowar, rows, mask, labels, args.seed, **settings)
    grey = np.where(mask[..., None], np.uint8(WHITE), images)
    shown = {"image": images, "kept": grey}
    image_command.write_results(args, (vae, flowar), shown, results)


def images_and_mask(
    args: argparse.Namespace, side: int
) -> tuple[UInt8[np.ndarray, "b R R 3"], Bool[np.ndarray, "R R"]]:
    """The images at `side` px, and where they are to be new."""
    if args.outpaint is not None:
        inside = min(max(1, round(args.outpaint * side)), side - 1)
        return editing.on_canvas(image_command.read_images(args.image, inside), side)
    images = image_command.read_images(args.image, side)
    if args.mask:
        return images, _mask(args.mask, args.image, side)
    left, top, right, bottom = (round(edge * side) for edge in args.box)
    mask = np.zeros((side, side), bool)
    mask[top:bottom, left:right] = True
    if not mask.any():
        raise InputError(
            f"--box {args.box} holds no pixel of the {side} x {side}; give a larger one"
        )
    return images, mask


def box(text: str) -> tuple[float, ...]:
    """ "left,top,right,bottom" as shares of the side."""
    edges = tuple(map(share, text.split(",")))
    if len(edges) != 4 or edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected left,top,right,bottom with left < right and top < bottom"
        )
    return edges


def share(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share between 0 and 1")
    return value


def inner(text: str) -> float:
    """A number in (0, 1)."""
    value = share(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share above 0 and below 1")
    return value


def _mask(path: str, images: Sequence[str], side: int) -> np.ndarray:
    """The mask, cut as the images are; its pixels stay black or white."""
    mask = image_command.picture(path)
    for image in images:
        size = image_command.picture(image).size
        if size != mask.size:
            raise InputError(f"{path} is {mask.size} px and {image} {size}: expected equal sizes")
    white = np.asarray(mask.pixels.convert("L").point(lambda grey: 255 * (grey >= WHITE)))
    new = center_crop(np.repeat(white[..., None], 3, axis=2), side)[..., 0] >= 1
    if not new.any():
        raise InputError(
            f"{path}: the mask is empty: it has to be white where the image is to be new, in the "
            "middle square, which is used"
        )
    return new
