"""The whole chain on real handwritten digits: image -> tokenizer -> codes -> generator -> image.

    detailflow demo --out runs/demo

Trains a tokenizer, extracts codes, trains a generator (and, to compare, one without correction
pairs), samples, and writes report.html and figures.json. Every stage resumes: the same command
continues where it was stopped.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from detailflow_jax import data
from detailflow_jax.demo import stages
from detailflow_jax.evaluate import digits, reconstruction, report
from detailflow_jax.inference import api, extract_codes, generate
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.runtime import pictures, platforms
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks.tokenizer import group_counts
from detailflow_jax.train import train

CFG_SCALE = 1.5
# Folder -> what differs from the configuration of digits.
GENERATORS = {"generator": (), "generator_without_correction": ("--config.loss.correction=0.0",)}


def train_generator(out: pathlib.Path, name: str) -> "api.Generator":
    """One of `GENERATORS` on the extracted codes."""
    overrides = [f"--config.data.source=codes:{out / 'codes'}", *GENERATORS[name]]
    train(load_config("configs/generator.py:digits", overrides), str(out / name))
    return api.load_generator(str(out / name))


def sample_digits(tokenizer: "api.Tokenizer", generator: "api.Generator"):
    """Codes int32 [B, N] of `stages.LABELS`, and their images uint8 [B, R, R, 3]."""
    codes = generate.sample(generator, stages.LABELS, batch_size=100, cfg_scale=CFG_SCALE)
    return codes, api.to_uint8(tokenizer.decode(codes))


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
        generator = train_generator(out, "generator")
    with clock.stage("train generator without correction"):
        plain = train_generator(out, "generator_without_correction")
    with clock.stage("sample"):
        codes, images = sample_digits(tokenizer, generator)
        _, plain_images = sample_digits(tokenizer, plain)
    runs = {name: report.read_metrics(out / name) for name in ("tokenizer", *GENERATORS)}
    with clock.stage("evaluate"):
        held_out = stages.held_out_digits()
        counts = group_counts(tokenizer.config)
        judge = digits.classifier()
        figures = {
            "psnr_by_tokens": reconstruction.psnr_by_tokens(tokenizer, held_out, counts),
            "codebook_usage": runs["tokenizer"][-1]["codebook_usage"],
            "accuracy": digits.accuracy(images, stages.LABELS, judge),
            "accuracy_without_correction": digits.accuracy(plain_images, stages.LABELS, judge),
        }
        shown = draw(tokenizer, held_out[:12], codes, images, counts)
    figures["seconds"] = clock.seconds
    generators = {"with correction": runs["generator"], "without": runs[list(GENERATORS)[1]]}
    tokenizer_run = {"tokenizer": runs["tokenizer"]}
    curves = {
        "Training of the tokenizer": report.curves(
            tokenizer_run, ["loss", "loss/mse", "codebook_usage"]
        ),
        "Training of the generators": report.curves(generators, ["loss", "accuracy"]),
    }
    stages.write_report(out, "DetailFlow on digits", figures, table(figures), shown, curves)
    return figures


def draw(
    tokenizer: "api.Tokenizer",
    held_out: np.ndarray,
    codes: np.ndarray,
    images: np.ndarray,
    counts: Sequence[int],
) -> dict[str, tuple[str, np.ndarray]]:
    """The pictures of the report: name -> caption and uint8 [H, W, 3]."""
    captions = [f"{n} tokens" for n in counts]

    def strip(codes: np.ndarray) -> np.ndarray:
        """Rows of more and more tokens, uint8 [counts * B, R, R, 3]."""
        return api.to_uint8(np.concatenate([decode_enlarged(tokenizer, codes, n) for n in counts]))

    reconstructed = np.concatenate([strip(tokenizer.encode(held_out)), held_out])
    columns, rows = len(held_out), [*captions, "original"]
    sampled = strip(stages.by_class(codes)[:, 0])
    return {
        "reconstructions": (
            "Held-out digits (last row) from more and more tokens",
            pictures.grid(reconstructed, columns=columns, scale=2, row_captions=rows),
        ),
        "samples": ("Generated digits, one column per class", stages.class_grid(images)),
        "progressive": (
            "Generated digits from more and more tokens",
            pictures.grid(sampled, columns=10, scale=2, row_captions=captions),
        ),
    }


def table(figures: dict) -> stages.Rows:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo", "runs/demo", run, table)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
