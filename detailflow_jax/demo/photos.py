"""Tokenizer and autoencoder on colour and texture: patches of ten photographs.

    detailflow demo photos --out runs/demo-photos

Trains both, and shows patches that neither was trained on from fewer and more tokens. Writes
report.html, figures.json and patches.png. Every stage resumes.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from detailflow_jax.data.shipped import PHOTOS
from detailflow_jax.demo import stages
from detailflow_jax.demo.stages import Grid
from detailflow_jax.evaluate import digits, reconstruction, report
from detailflow_jax.inference import api
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.runtime import platforms
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks.tokenizer import group_counts
from detailflow_jax.train import train

NETWORKS = {"tokenizer": api.load_tokenizer, "vae": api.load_vae}
SHOWN = (4, 8, 16, 32)
"""Token counts of the rows, as far as the tokenizer has them."""


def run(out: pathlib.Path, seed: int) -> dict:
    """All stages; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    for name in NETWORKS:
        with clock.stage(f"train {name}"):
            config = load_config(f"configs/{name}.py:photos", [f"--config.seed={seed}"])
            train(config, str(out / name))
    with clock.stage("evaluate"):
        tokenizer, vae = (load(str(out / name)) for name, load in NETWORKS.items())
        held_out, labels = digits.load("photos:test", tokenizer.config.image_size)
        restored = api.to_uint8(vae.decode(vae.encode(held_out)))
        counts = group_counts(tokenizer.config)
        figures = {
            "psnr_by_tokens": reconstruction.psnr_by_tokens(tokenizer, held_out, counts),
            "vae_psnr": reconstruction.mean_psnr(restored, held_out),
        }
        grid = draw(tokenizer, vae, held_out[_most_contrast(held_out, labels)])
    figures["seconds"] = clock.seconds
    runs = {name: report.read_metrics(out / name) for name in NETWORKS}
    title, images = "Colour and texture", "patches of photographs"
    sections = page(figures, grid, runs, out)
    stages.write_report(out, title, figures, {"patches": grid}, sections, images)
    return figures


def _most_contrast(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each photograph the patch with the most contrast, since a sky shows nothing: [10, ...]."""
    contrast = images.std(axis=(1, 2, 3))
    return np.array([np.argmax(np.where(labels == label, contrast, -1)) for label in range(10)])


def draw(tokenizer: "api.Tokenizer", vae: "api.VAE", images: np.ndarray) -> Grid:
    """One patch of each photograph, from more and more tokens and from latents."""
    codes = tokenizer.encode(images)
    counts = [count for count in SHOWN if count <= tokenizer.config.num_tokens]
    rows = {"original": images}
    rows |= {f"{n} tokens": api.to_uint8(decode_enlarged(tokenizer, codes, n)) for n in counts}
    rows["autoencoder"] = api.to_uint8(vae.decode(vae.encode(images)))
    return Grid(np.concatenate([*rows.values()]), [*rows], heads=tuple(PHOTOS))


def page(
    figures: dict, grid: Grid, runs: Mapping[str, list[dict[str, float]]], out: pathlib.Path
) -> dict[str, list[str]]:
    """The sections of the page."""
    curves = functools.partial(stages.curves, runs)
    return {
        "From fewer and more tokens": grid.section(
            "One patch of each photograph, of 32 pixels a side, that nothing was trained on: as it "
            "is, as its first tokens show it, and as the autoencoder of FlowAR keeps it. The first "
            "tokens say one colour, the next ones which colours are where, the later ones where "
            "edges run. Fine texture takes longer to learn than some minutes, and until then the "
            "tokenizer's patches of 8 pixels show.",
        ),
        "Figures": [report.table_html(table(figures))],
        "Training of the tokenizer": [
            curves(
                "tokenizer",
                {
                    "loss/mse": "Squared error of the pixels",
                    "codebook_usage": "Share of the codes that are in use",
                },
            )
        ],
        "Training of the autoencoder": [
            curves("vae", {"loss/mse": "Squared error of the pixels", "psnr": "PSNR (dB)"})
        ],
        stages.NEXT: [
            report.commands_html(
                {
                    "Patches as tokens, to train a generator on:": "detailflow extract --tokenizer "
                    f"{out}/tokenizer --source photos:train --out runs/codes",
                    "Both systems on digits:": "make demo demo-flowar",
                    **stages.OWN_IMAGES,
                }
            )
        ],
    }


def table(figures: dict) -> stages.Rows:
    """The figures as rows for people."""
    return [
        *(
            (f"Held-out patches from {n} tokens, PSNR", f"{value:.2f} dB")
            for n, value in figures["psnr_by_tokens"].items()
        ),
        ("Held-out patches through the autoencoder, PSNR", f"{figures['vae_psnr']:.2f} dB"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    description = "Train and report on patches of photographs, in minutes on a CPU."
    return stages.main(argv, "demo photos", "runs/demo-photos", run, table, description)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
