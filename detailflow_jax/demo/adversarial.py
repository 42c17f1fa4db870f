"""The tokenizer of the demo with adversarial and perceptual terms, beside the one without.

    python -m detailflow_jax.demo.adversarial --out runs/demo-adversarial

Trains on real handwritten digits, without them, with PatchGAN from a third of the run on, and with
LPIPS as well, whose weights are random, as the published ones need not be at hand. Writes
report.html with the curves of losses and logits. Every stage resumes.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from detailflow_jax import data
from detailflow_jax.demo import stages
from detailflow_jax.evaluate import reconstruction, report
from detailflow_jax.inference import api
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import pictures
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.train import train

_PATCHGAN = ("--config.losses.adversarial.weight=0.1", "--config.discriminator.start_step=224")
_LPIPS = ("--config.losses.perceptual.weight=0.5", "--config.losses.perceptual.random=True")
ARMS = {"off": (), "patchgan": _PATCHGAN, "patchgan_lpips": (*_PATCHGAN, *_LPIPS)}
COMMON = ["loss/mse", "loss/perceptual", "gradient_norm", "codebook_usage"]
JUDGING = ("patchgan", "patchgan_lpips")
JUDGED = ["loss/adversarial", "discriminator/loss", "discriminator/real", "discriminator/fake"]


def run(out: pathlib.Path) -> dict:
    """All runs; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    for arm, overrides in ARMS.items():
        with clock.stage(f"train {arm}"):
            train(load_config("configs/tokenizer.py:digits", overrides), str(out / arm))
    with clock.stage("evaluate"):
        held_out = np.stack([x["image"] for x in data.make_source("digits:test")])
        models = {arm: api.load_tokenizer(str(out / arm)) for arm in ARMS}
        every = models["off"].config.num_tokens
        lines = {arm: report.read_metrics(out / arm) for arm in ARMS}
        judged = [line for arm in JUDGING for line in lines[arm]]
        figures = {
            "psnr": {
                arm: reconstruction.psnr_by_tokens(model, held_out, [every])[every]
                for arm, model in models.items()
            },
            "finite": None not in [x for line in judged for x in line.values()],
            "largest_mean_logit": max(abs(line[x]) for line in judged for x in JUDGED[-2:]),
            "images_per_second": {arm: lines[arm][-1]["images_per_second"] for arm in ARMS},
            "seconds": clock.seconds,
        }
    write_report(out, figures, lines, draw(models, held_out[:12]))
    return figures


def draw(models: dict[str, "api.Tokenizer"], images: np.ndarray) -> np.ndarray:
    """Reconstructions of all, and the originals: uint8 [H, W, 3]."""
    rows = [np.asarray(pixels.to_uint8(x.decode(x.encode(images)))) for x in models.values()]
    return pictures.grid(
        np.concatenate([*rows, images]),
        columns=len(images),
        scale=2,
        row_captions=[*models, "original"],
    )


def table(figures: dict) -> list[tuple[str, str]]:
    """The figures as rows for people."""
    rows = [(f"PSNR of held-out digits, {k}", f"{v:.2f} dB") for k, v in figures["psnr"].items()]
    rows += [
        (f"images/s at the end, {k}", f"{v:.0f}") for k, v in figures["images_per_second"].items()
    ]
    rows += [
        ("every figure of the runs is finite", str(figures["finite"])),
        ("largest mean logit", f"{figures['largest_mean_logit']:.2f}"),
    ]
    return rows + stages.seconds_table(figures["seconds"])


def write_report(out: pathlib.Path, figures: dict, lines: dict, picture: np.ndarray) -> None:
    """figures.json and report.html, each atomically."""
    parts = [
        report.table_html(table(figures)),
        report.figure_html("Reconstructions of held-out digits", report.png(picture)),
        report.figure_html("All runs", report.curves(lines, COMMON)),
        report.figure_html("The discriminator", report.curves(lines, JUDGED)),
    ]
    page = report.page("Perceptual and adversarial terms on digits", parts)
    write_atomically(out / "report.html", page.encode())
    write_atomically(out / "figures.json", json.dumps(figures, indent=2).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all arms and prints the table."""
    return stages.main(argv, "demo adversarial", "runs/demo-adversarial", run, table)


if __name__ == "__main__":
    sys.exit(main())
