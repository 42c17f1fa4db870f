"""Small images made larger by DetailFlow: the generator adds the tokens of the detail.

detailflow upscale --tokenizer runs/tok --generator runs/gen --image small.png --out runs/large
"""

import argparse
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from detailflow_jax.inference import api, image_command
from detailflow_jax.inference.errors import InputError
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation
from detailflow_jax.runtime.command import whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = image_command.parser_of(
        "upscale", "Make small images larger.", "tokenizer", "generator"
    )
    parser.add_argument(
        "--size",
        type=whole(1),
        help="side in pixels to start from; default that of the smallest image",
    )
    parser.add_argument(
        "--enlarged",
        action="store_true",
        help="enlarge plainly before encoding: better where the tokenizer was trained on one size",
    )
    return image_command.run(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Enlarges what the arguments say and writes the results."""
    tokenizer, generator = api.load_tokenizer(args.tokenizer), api.load_generator(args.generator)
    images = read_small(args, tokenizer)
    rows, labels, settings = image_command.repeated(images, args, generator)
    results = api.upscale(
        tokenizer, generator, rows, labels, args.seed, enlarged=args.enlarged, **settings
    )
    plain = interpolation.enlarge(pixels.to_float(images), tokenizer.config.image_size)
    shown = {"bicubic": api.to_uint8(plain)}
    image_command.write_results(args, (tokenizer, generator), shown, results)


def read_small(args: argparse.Namespace, tokenizer: api.Tokenizer) -> UInt8[np.ndarray, "b s s 3"]:
    """The images, reduced to the largest size, up to --size, that tokens stand for.

    Raises:
      InputError: no such size, or an image that is smaller than --size.
    """
    smallest = min(min(image_command.picture(path).size) for path in args.image)
    side = smallest if args.size is None else args.size
    if side > smallest:
        raise InputError(
            f"--size {side}: the smallest image has {smallest} px, expected at most that"
        )
    return image_command.read_images(args.image, start_side(tokenizer, side))


def start_side(tokenizer: api.Tokenizer, side: int) -> int:
    """The largest size, up to `side` px, that tokens stand for.

    Raises:
      InputError: it is too small for one token, or as large as the tokenizer's images.
    """
    resolutions, full = tokenizer.config.resolutions, tokenizer.config.image_size
    sizes = sorted({resolutions.decoded_size(n) for n in resolutions.token_counts} - {full})
    if side >= full:
        raise InputError(
            f"{side} px is no less than the {full} px of the results; give a smaller size (--size)"
        )
    if not sizes or side < sizes[0]:
        raise InputError(f"{side} px is too small for one token, expected one of {sizes} px")
    return max(size for size in sizes if size <= side)
