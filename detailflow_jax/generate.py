"""Generated images: labels -> codes -> pictures.

    python -m detailflow_jax.generate --tokenizer runs/tok --generator runs/gen --labels 0-9 \\
        --per_class 8 --cfg_scale 1.5 --out runs/samples

Writes `samples.npz` (`arr_0` uint8 [B, H, W, 3], and `labels`), `grid.png`, on request one PNG an
image, and with several token counts `progressive.png`: the same samples from fewer and more tokens.
"""

import argparse
import io
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from detailflow_jax import api, pictures
from detailflow_jax.checkpoint import CheckpointError
from detailflow_jax.config import ConfigError, write_atomically
from detailflow_jax.evaluate.reconstruction import decode_enlarged
from detailflow_jax.ops import images as pixels


def parse_labels(text: str) -> list[int]:
    """ "0-9", "3,1,4" or a mix -> class numbers.

    Raises:
      ValueError: not of this form.
    """
    labels = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"cannot read labels {text!r}: expected numbers as in 0-9 or 3,1,4")
        labels.extend(range(int(first), int(last or first) + 1))
    return labels


def parse_counts(text: str | None) -> list[int]:
    """ "4,8,16" -> token counts; None -> none."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(
            f"cannot read num_tokens {text!r}: expected numbers as in 4,8,16"
        ) from error


def sample_codes(
    generator: "api.Generator", labels: np.ndarray, *, batch_size: int, **options
) -> np.ndarray:
    """`Generator.sample` in batches behind a progress bar: int32 [B, n]."""
    parts = []
    with tqdm(total=len(labels), unit="image", desc="sample") as progress:
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            parts.append(
                generator.sample(part, first_index=start, batch_size=batch_size, **options)
            )
            progress.update(len(part))
    return np.concatenate(parts)


def write_outputs(
    out: str,
    labels: np.ndarray,
    images: np.ndarray,
    progressive: dict[int, np.ndarray],
    *,
    columns: int,
    single: bool,
) -> None:
    """Writes the pictures and samples.npz, each atomically."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scale = max(1, 64 // images.shape[1])
    pictures.save_png(folder / "grid.png", pictures.grid(images, columns=columns, scale=scale))
    if progressive:
        rows = np.concatenate([part[:16] for part in progressive.values()])
        captions = [f"{count} tokens" for count in progressive]
        width = min(16, len(images))
        strip = pictures.grid(rows, columns=width, scale=scale, row_captions=captions)
        pictures.save_png(folder / "progressive.png", strip)
    if single:
        (folder / "images").mkdir(exist_ok=True)
        for i, (label, image) in enumerate(zip(labels, images, strict=True)):
            pictures.save_png(folder / "images" / f"{i:06d}_class{label:04d}.png", image)
    stream = io.BytesIO()
    np.savez(stream, images, labels=labels)
    write_atomically(folder / "samples.npz", stream.getvalue())


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m detailflow_jax.generate",
        description="Generate images of given classes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="what df.load_tokenizer takes, such as a workdir")
    add("--generator", required=True, help="what df.load_generator takes, such as a workdir")
    add("--out", required=True, help="folder for the pictures and samples.npz")
    add("--labels", required=True, help="class numbers, as 0-9 or 3,1,4")
    add("--per_class", type=int, default=8, help="samples a class")
    add("--num_tokens", help="token counts, as 4,8,16; the largest gives samples.npz and grid.png")
    add("--cfg_scale", type=float, default=1.5, help="guidance >= 1; 1 means none")
    add("--gradual_cfg", action="store_true", help="lower the guidance group by group")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--top_k", type=int, default=0, help="keep the k most likely codes; 0 keeps all")
    add("--top_p", type=float, default=1.0, help="keep the likeliest codes of this probability")
    add("--greedy", action="store_true", help="always take the most likely code")
    add("--seed", type=int, default=0, help="sample i depends on the seed and i alone")
    add("--batch_size", type=int, default=64, help="samples a call of the compiled program")
    add("--single", action="store_true", help="also write every image as a PNG of its own")
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> np.ndarray:
    """Does what the arguments say; returns the images, uint8 [B, H, W, 3].

    Raises:
      ValueError: a label, count or setting that the models do not allow, or models that do not
        belong together.
    """
    if args.per_class < 1 or args.batch_size < 1:
        raise ValueError("--per_class and --batch_size must be at least 1")
    labels = np.repeat(parse_labels(args.labels), args.per_class)
    counts = sorted(set(parse_counts(args.num_tokens)))
    tokenizer = api.load_tokenizer(args.tokenizer)
    generator = api.load_generator(args.generator)
    api.check_pair(tokenizer, generator)
    counts = counts or [generator.config.num_tokens]
    for count in counts:
        tokenizer.config.resolutions.check(count)
    codes = sample_codes(
        generator,
        labels,
        batch_size=args.batch_size,
        seed=args.seed,
        cfg_scale=args.cfg_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        gradual_cfg=args.gradual_cfg,
        greedy=args.greedy,
        num_tokens=counts[-1],
    )
    images = np.asarray(pixels.to_uint8(tokenizer.decode(codes)))
    progressive = {}
    if len(counts) > 1:
        progressive = {
            count: np.asarray(pixels.to_uint8(decode_enlarged(tokenizer, codes[:16], count)))
            for count in counts
        }
    write_outputs(args.out, labels, images, progressive, columns=args.per_class, single=args.single)
    return images


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 with one line that says what is wrong."""
    args = parse_arguments(argv)
    try:
        images = generate(args)
    except (ConfigError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(images)} images of {images.shape[1]}x{images.shape[2]} px in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
