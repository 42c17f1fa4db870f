"""Editing, variations and upscaling on held-out digits: what the judge and the PSNR say.

    make demo && python benchmarks/editing.py
    python benchmarks/editing.py --vae runs/demo-flowar/vae --flowar runs/demo-flowar/flowar

    reading     PSNR, and share read as themselves, of digits reduced to a size that tokens decode
                to, as the tokenizer reads them (the tokens they are worth, enlarged), beside
                bicubic interpolation, as many tokens of the whole digit, its reconstruction, and
                their tokens with the others of the whole digit; how many of their tokens are its
    upscaling   the same of what the generator adds to their tokens, to those of the digit enlarged
                before, and to those of the whole digit
    variations  how many digits are read as themselves, and as the next digit, after the first n
                tokens were kept and the others sampled as the next digit
    edits       how many digits are read as themselves and as the next one before and after
                inpainting (their middle was black), outpainting (their border was cut off), and
                class edits (their middle, or all but their border, anew as the next digit); and
                how far pixels outside of the mask are from the reconstruction (of 2)

The first is of --tokenizer, the next two of --generator beside it, the last of --vae and --flowar.
The classifier is fitted on the training split of the same digits. Writes editing.json and a picture
of each into --out.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

import detailflow_jax as df
from detailflow_jax.evaluate import digits
from detailflow_jax.evaluate.reconstruction import mean_psnr
from detailflow_jax.inference.editing import on_canvas
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation
from detailflow_jax.runtime import pictures
from detailflow_jax.runtime.files import write_atomically

SAMPLING = {"cfg_scale": 3.0, "temperature": 0.5}
SHOWN = 10
GREY = 128  # of what is painted anew, in the pictures


def reduced(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [B, R, R, 3] -> uint8 [B, side, side, 3], by area averages."""
    matrix = interpolation.area_matrix(images.shape[1], side)
    small = interpolation.apply_matrices(images.astype(np.float32), matrix, matrix)
    return np.asarray(small).round().astype(np.uint8)


def bicubic(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [B, s, s, 3] -> uint8 [B, side, side, 3]."""
    shape = (len(images), side, side, 3)
    large = jax.image.resize(pixels.to_float(images), shape, "cubic")
    return np.asarray(pixels.to_uint8(large))


def small_sizes(tokenizer, images):
    """(side, tokens, digits reduced to it) of every size below the full one."""
    resolutions = tokenizer.config.resolutions
    sizes = {resolutions.decoded_size(n) for n in _counts(tokenizer)}
    for size in sorted(sizes - {images.shape[1]}):
        yield size, resolutions.best_count(size), reduced(images, size)


def _restored(judge, images, labels, rows):
    """{way: PSNR and share read as themselves} of all rows but the digits."""
    return {
        way: {"psnr": mean_psnr(made, images), "itself": judge.accuracy(made, labels)}
        for way, made in rows.items()
        if way != "digit"
    }


def reading(tokenizer, images, labels, judge):
    """Figures of small digits as the tokenizer reads them, nothing added; rows by caption."""
    codes, same = tokenizer.encode(images), {}
    rows = {"digit": images, "reconstruction": df.to_uint8(tokenizer.decode(codes))}
    for size, n, small in small_sizes(tokenizer, images):
        rows[f"bicubic from {size} px"] = bicubic(small, images.shape[1])
        own = tokenizer.encode(small)[:, :n]
        same[f"{n} tokens of {size} px"] = float(np.mean(own == codes[:, :n]))
        for way, found in {f"{n} tokens of {size} px": own, f"{n} of the digit": codes}.items():
            rows[way] = df.to_uint8(decode_enlarged(tokenizer, found, n))
        mixed = np.concatenate([own, codes[:, n:]], axis=1)
        rows[f"{n} of {size} px, others of it"] = df.to_uint8(tokenizer.decode(mixed))
    return _restored(judge, images, labels, rows) | {"same tokens": same}, rows


def upscaling(tokenizer, generator, images, labels, judge, seed):
    """Figures of small digits with the tokens that the generator adds; rows by caption."""
    models, rows = (tokenizer, generator), {"digit": images}

    def upscale(small, **how):
        return df.upscale(*models, small, labels, seed, **how, **SAMPLING)

    for size, n, small in small_sizes(tokenizer, images):
        ways = {
            f"upscaled from {size} px": upscale(small),
            f"from {n} of it enlarged": upscale(small, enlarged=True),
            f"from {n} of the digit": df.vary(*models, images, labels, n, seed, **SAMPLING),
        }
        rows |= {way: df.to_uint8(made) for way, made in ways.items()}
    return _restored(judge, images, labels, rows), rows


def variations(tokenizer, generator, images, labels, judge, seed):
    """{kept tokens: shares read as themselves and as the next digit}, and rows of pictures."""
    asked = (labels + 1) % 10
    figures, rows = {}, {"digit": images}
    for keep in (0, *_counts(tokenizer)):
        made = df.vary(tokenizer, generator, images, asked, keep, seed, **SAMPLING)
        rows[f"{keep} kept"] = df.to_uint8(made)
        figures[f"{keep} kept"] = _read(judge, rows[f"{keep} kept"], labels, asked)
    return figures, rows


def edits(vae, flowar, images, labels, judge, seed):
    """{edit: shares read before and after, largest difference outside}, and rows of pictures."""
    asked = (labels + 1) % 10
    rows = {"digit": images, "reconstruction": df.to_uint8(vae.decode(vae.encode(images)))}
    figures = {"reconstruction": _read(judge, rows["reconstruction"], labels, asked)}
    for name, (given, mask, classes) in tasks(images, labels, asked).items():
        made = df.edit(vae, flowar, given, mask, classes, seed)
        outside = np.abs(made - vae.decode(vae.encode(given)))[:, ~mask].max()
        rows[f"{name}: given"] = np.where(mask[..., None], np.uint8(GREY), given)
        rows[f"{name}: made"] = made = df.to_uint8(made)
        figures[name] = {
            "before": _read(judge, given, labels, asked),
            "after": _read(judge, made, labels, asked),
            "outside": float(outside),
        }
    return figures, rows


def tasks(images, labels, asked):
    """{edit: images, mask bool [R, R], classes of the new part}.

    What is to be filled in is not in the images: a VAE sees some pixels beyond those of a latent.
    """
    side = images.shape[1]
    cut = side // 4
    middle, most = _middle(side, cut), _middle(side, side // 8)
    black = np.where(middle[..., None], np.uint8(0), images)
    return {
        "inpaint": (black, middle, labels),
        "outpaint": (*on_canvas(images[:, cut:-cut, cut:-cut], side), labels),
        "middle as next": (images, middle, asked),
        "all but border as next": (images, most, asked),
    }


def _middle(side: int, border: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[border:-border, border:-border] = True
    return mask


def _counts(tokenizer) -> list[int]:
    c = tokenizer.config
    return list(range(c.group_size, c.num_tokens + 1, c.group_size))


def _read(judge: digits.Judge, images, labels, asked) -> dict[str, float]:
    found = {"itself": labels, "the next digit": asked}
    return {name: judge.accuracy(images, digit) for name, digit in found.items()}


def draw(path: pathlib.Path, rows: dict[str, np.ndarray]) -> None:
    """The first digits of every row."""
    shown = np.concatenate([images[:SHOWN] for images in rows.values()])
    pictures.save_png(path, pictures.grid(shown, SHOWN, scale=2, row_captions=list(rows)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for kind in ("tokenizer", "generator", "vae", "flowar"):
        demo = "runs/demo-flowar" if kind in ("vae", "flowar") else "runs/demo"
        add(f"--{kind}", help=f"such as {demo}/{kind}")
    add("--source", default="mnist", help="digits, mnist or digits (default: %(default)s)")
    add("--count", type=int, default=500, help="held-out digits (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--out", default="runs/editing", help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.vae) != bool(args.flowar):
        parser.error("--vae and --flowar go together")
    if args.generator and not args.tokenizer:
        parser.error("--generator needs --tokenizer")
    if not args.tokenizer and not args.vae:
        args.tokenizer, args.generator = "runs/demo/tokenizer", "runs/demo/generator"
    if args.count < SHOWN:
        parser.error(f"--count {args.count}: expected at least {SHOWN}")
    return args


def held_out(args: argparse.Namespace, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Some held-out digits of `side` px, and their labels."""
    images, labels = digits.load(f"{args.source}:test", side)
    chosen = np.random.default_rng(args.seed).permutation(len(images))[: args.count]
    return images[chosen], labels[chosen]


def measure(args: argparse.Namespace) -> dict[str, tuple]:
    """{part: (figures, rows of pictures)} of the models that there are."""
    judge, parts = digits.Judge(f"{args.source}:train"), {}
    if args.tokenizer:
        tokenizer = df.load_tokenizer(args.tokenizer)
        shown = held_out(args, tokenizer.config.image_size)
        parts["reading"] = reading(tokenizer, *shown, judge)
    if args.generator:
        generator = df.load_generator(args.generator)
        for part in (upscaling, variations):
            parts[part.__name__] = part(tokenizer, generator, *shown, judge, args.seed)
        figures, rows = parts["upscaling"]
        parts["upscaling"] = figures, parts["reading"][1] | rows  # in one picture
    if args.flowar:
        vae, flowar = df.load_vae(args.vae), df.load_flowar(args.flowar)
        shown = held_out(args, flowar.config.latent_side * vae.config.stride)
        parts["edits"] = edits(vae, flowar, *shown, judge, args.seed)
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out, parts = pathlib.Path(args.out), measure(args)
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, rows) in parts.items():
        draw(out / f"{name}.png", rows)
    figures = {name: found for name, (found, _) in parts.items()}
    text = json.dumps(figures, indent=2)
    write_atomically(out / "editing.json", text.encode())
    print(text)


if __name__ == "__main__":
    main()
