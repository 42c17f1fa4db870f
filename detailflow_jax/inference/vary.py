"""Variations of images by DetailFlow: their first tokens are kept, the others are sampled.

    detailflow vary --tokenizer runs/tok --generator runs/gen --image cat.png --keep 4 \\
        --label cat --out runs/variations
"""

import argparse
from collections.abc import Sequence

from detailflow_jax.inference import api, image_command
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.runtime.command import whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = image_command.parser_of(
        "vary", "Keep the first tokens of an image and sample the others.", "tokenizer", "generator"
    )
    parser.add_argument("--keep", type=whole(0), required=True, help="how many tokens are kept")
    return image_command.run(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Varies what the arguments say and writes the results."""
    tokenizer, generator = api.load_tokenizer(args.tokenizer), api.load_generator(args.generator)
    images = image_command.read_images(args.image, tokenizer.config.image_size)
    rows, labels, settings = image_command.repeated(images, args, generator)
    results = api.vary(tokenizer, generator, rows, labels, args.keep, args.seed, **settings)
    shown = {"image": images}
    if args.keep:
        kept = decode_enlarged(tokenizer, tokenizer.encode(images), args.keep)
        shown[f"{args.keep} tokens"] = api.to_uint8(kept)
    image_command.write_results(args, (tokenizer, generator), shown, results)
