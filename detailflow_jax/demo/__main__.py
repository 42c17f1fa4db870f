"""The whole chain on real handwritten digits: image -> tokenizer -> codes -> generator -> image.

    python -m detailflow_jax.demo --out runs/demo

Trains a tokenizer, extracts codes, trains a generator (and, to compare, one without correction
pairs), samples, and writes report.html and figures.json. Every stage resumes: the same command
again goes on where it was stopped.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from detailflow_jax import data
from detailflow_jax.demo import stages
from detailflow_jax.evaluate import digits, reconstruction, report
from detailflow_jax.inference import api, extract_codes, generate
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import pictures
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.tasks.tokenizer import group_counts
from detailflow_jax.train import train

SAMPLES_A_CLASS = 50
CFG_SCALE = 1.5


def train_generator(out: pathlib.Path, name: str, *, correction: bool) -> "api.Generator":
    """A generator on the extracted codes, with or without correction pairs."""
    overrides = [f"--config.data.source=codes:{out / 'codes'}"]
    if not correction:
        overrides.append("--config.loss.correction=0.0")
    config = load_config("configs/generator.py:digits", overrides)
    train(config, str(out / name))
    return api.load_generator(str(out / name))


def sample_digits(tokenizer: "api.Tokenizer", generator: "api.Generator"):
    """Equally many of each digit: (codes int32 [B, N], images uint8 [B, R, R, 3], labels)."""
    labels = np.repeat(np.arange(10), SAMPLES_A_CLASS)
    codes = generate.sample(generator, labels, batch_size=100, cfg_scale=CFG_SCALE)
    return codes, np.asarray(pixels.to_uint8(tokenizer.decode(codes))), labels


def run(out: pathlib.Path) -> dict:
    """All stages; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    with clock.stage("train tokenizer"):
        train(load_config("configs/tokenizer.py:digits"), str(out / "tokenizer"))
    with clock.stage("extract codes"):
        tokenizer = api.load_tokenizer(str(out / "tokenizer"))
        source = data.make_source("digits:train")
        extract_codes.extract(tokenizer, source, str(out / "codes"), crops="five", shard_size=512)
    with clock.stage("train generator"):
        generator = train_generator(out, "generator", correction=True)
    with clock.stage("train generator without correction"):
        plain = train_generator(out, "generator_without_correction", correction=False)
    with clock.stage("sample"):
        codes, images, labels = sample_digits(tokenizer, generator)
        _, plain_images, _ = sample_digits(tokenizer, plain)
    with clock.stage("evaluate"):
        held_out = np.stack([x["image"] for x in data.make_source("digits:test")])
        counts = group_counts(tokenizer.config)
        judge = digits.classifier()
        metrics = report.read_metrics(out / "tokenizer")
        figures = {
            "psnr_by_tokens": reconstruction.psnr_by_tokens(tokenizer, held_out, counts),
            "codebook_usage": metrics[-1]["codebook_usage"],
            "accuracy": digits.accuracy(images, labels, judge),
            "accuracy_without_correction": digits.accuracy(plain_images, labels, judge),
        }
        shown = draw(tokenizer, held_out, codes, images, counts)
    figures["seconds"] = clock.seconds
    write_report(out, figures, shown)
    return figures


def draw(
    tokenizer: "api.Tokenizer",
    held_out: np.ndarray,
    codes: np.ndarray,
    images: np.ndarray,
    counts: Sequence[int],
) -> dict[str, np.ndarray]:
    """The pictures of the report, by caption: uint8 [H, W, 3]."""
    some = held_out[:12]
    some_codes = tokenizer.encode(some)

    def strip(codes: np.ndarray) -> np.ndarray:
        """Rows of more and more tokens, uint8 [counts * B, R, R, 3]."""
        rows = [decode_enlarged(tokenizer, codes, n) for n in counts]
        return np.asarray(pixels.to_uint8(np.concatenate(rows)))

    captions = [f"{n} tokens" for n in counts]
    # The first sample of each class, then the second, ...: one column per class.
    by_class = images.reshape(10, SAMPLES_A_CLASS, *images.shape[1:])[:, :8].swapaxes(0, 1)
    first = codes.reshape(10, SAMPLES_A_CLASS, -1)[:, 0]
    return {
        "Held-out digits (last row) from more and more tokens": pictures.grid(
            np.concatenate([strip(some_codes), some]),
            columns=len(some),
            scale=2,
            row_captions=[*captions, "original"],
        ),
        "Generated digits, one column per class": pictures.grid(
            by_class.reshape(-1, *images.shape[1:]),
            columns=10,
            scale=2,
            column_captions=[str(i) for i in range(10)],
        ),
        "Generated digits from more and more tokens": pictures.grid(
            strip(first), columns=10, scale=2, row_captions=captions
        ),
    }


def table(figures: dict) -> list[tuple[str, str]]:
    """The figures as rows for people."""
    rows = [
        (f"PSNR of held-out digits, {n} tokens", f"{value:.2f} dB")
        for n, value in figures["psnr_by_tokens"].items()
    ]
    rows += [
        ("codebook usage", f"{figures['codebook_usage']:.1%}"),
        ("generated digits of the asked class", f"{figures['accuracy']:.1%}"),
        ("the same without correction pairs", f"{figures['accuracy_without_correction']:.1%}"),
    ]
    return rows + stages.seconds_table(figures["seconds"])


def write_report(out: pathlib.Path, figures: dict, shown: dict[str, np.ndarray]) -> None:
    """figures.json, the pictures as PNG, and report.html, each atomically."""
    tokenizer_runs = {"tokenizer": report.read_metrics(out / "tokenizer")}
    generator_runs = {
        "with correction": report.read_metrics(out / "generator"),
        "without": report.read_metrics(out / "generator_without_correction"),
    }
    tokenizer_curves = report.curves(tokenizer_runs, ["loss", "loss/mse", "codebook_usage"])
    parts = [
        "<p>Everything below comes from one run on scikit-learn's handwritten digits: trained, "
        "sampled and measured on this machine.</p>",
        report.table_html(table(figures)),
        *(report.figure_html(caption, report.png(image)) for caption, image in shown.items()),
        report.figure_html("Training of the tokenizer", tokenizer_curves),
        report.figure_html(
            "Training of the generators", report.curves(generator_runs, ["loss", "accuracy"])
        ),
    ]
    names = ("reconstructions", "samples", "progressive")
    for name, image in zip(names, shown.values(), strict=True):
        pictures.save_png(out / f"{name}.png", image)
    page = report.page("DetailFlow on digits", parts)
    write_atomically(out / "report.html", page.encode())
    write_atomically(out / "figures.json", json.dumps(figures, indent=2).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo", "runs/demo", run, table)


if __name__ == "__main__":
    sys.exit(main())
