"""The tokenizer of the demo with adversarial and perceptual terms, beside the one without.

    detailflow demo adversarial --out runs/demo-adversarial

Trains on real handwritten digits: without the terms, with PatchGAN from a third of the run on, and
with LPIPS as well, whose weights are random so that no download is needed. Writes report.html with
the curves of losses and logits. Every stage resumes.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from detailflow_jax.demo import stages
from detailflow_jax.evaluate import digits, reconstruction, report
from detailflow_jax.inference import api
from detailflow_jax.runtime import platforms
from detailflow_jax.runtime.config import load_config
from detailflow_jax.train import train

_PATCHGAN = ("--config.losses.adversarial.weight=0.1", "--config.discriminator.start_step=224")
_LPIPS = ("--config.losses.perceptual.weight=0.5", "--config.losses.perceptual.random=True")
ARMS = {"off": (), "patchgan": _PATCHGAN, "patchgan_lpips": (*_PATCHGAN, *_LPIPS)}
COMMON = ["loss/mse", "loss/perceptual", "gradient_norm", "codebook_usage"]
JUDGED = ["loss/adversarial", "discriminator/loss", "discriminator/real", "discriminator/fake"]


def run(out: pathlib.Path, seed: int) -> dict:
    """All runs; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    for arm, overrides in ARMS.items():
        with clock.stage(f"train {arm}"):
            seeded = [f"--config.seed={seed}", *overrides]
            train(load_config("configs/tokenizer.py:digits", seeded), str(out / arm))
    with clock.stage("evaluate"):
        held_out, labels = digits.load("digits:test", 32)
        models = {arm: api.load_tokenizer(str(out / arm)) for arm in ARMS}
        every = models["off"].config.num_tokens
        lines = {arm: report.read_metrics(out / arm) for arm in ARMS}
        judged = [line for arm in ARMS if arm != "off" for line in lines[arm]]
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
    grid = draw(models, stages.one_of_each(held_out, labels))
    sections = {
        "Reconstructions of held-out digits": [grid.html()],
        "Figures": [report.table_html(table(figures))],
        "All runs": [curves(lines, COMMON)],
        "The discriminator": [curves(lines, JUDGED)],
    }
    title = "Perceptual and adversarial terms on digits"
    stages.write_report(out, title, figures, {"reconstructions": grid}, sections)
    return figures


def curves(runs: Mapping[str, list[dict[str, float]]], names: Sequence[str]) -> str:
    """Plots of metrics, one line per run."""
    return report.plots_html({name: report.curve(runs, name) for name in names})


def draw(models: Mapping[str, "api.Tokenizer"], images: np.ndarray) -> stages.Grid:
    """Reconstructions of all, and the originals."""
    rows = [api.to_uint8(model.decode(model.encode(images))) for model in models.values()]
    return stages.Grid(np.concatenate([*rows, images]), [*models, "real"])


def table(figures: dict) -> stages.Rows:
    """The figures as rows for people."""
    rows = [(f"PSNR of held-out digits, {k}", f"{v:.2f} dB") for k, v in figures["psnr"].items()]
    rows += [
        (f"images/s at the end, {k}", f"{v:.0f}") for k, v in figures["images_per_second"].items()
    ]
    rows += [
        ("every figure of the runs is finite", str(figures["finite"])),
        ("largest mean logit", f"{figures['largest_mean_logit']:.2f}"),
    ]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all arms and prints the table."""
    return stages.main(argv, "demo adversarial", "runs/demo-adversarial", run, table)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
