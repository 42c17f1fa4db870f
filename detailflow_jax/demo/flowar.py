"""FlowAR on real handwritten digits: image -> autoencoder -> latents -> FlowAR -> image.

    python -m detailflow_jax.demo.flowar --out runs/demo-flowar

Trains an autoencoder, caches latents, trains FlowAR on them, samples, and writes report.html and
figures.json. Every stage resumes: the same command again goes on where it was stopped.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from detailflow_jax import data
from detailflow_jax.demo import stages
from detailflow_jax.evaluate import digits, report
from detailflow_jax.inference import api, extract_latents, generate
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation
from detailflow_jax.ops import scales as grids
from detailflow_jax.runtime import pictures
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.train import train

SAMPLES_A_CLASS = 50
SAMPLING = {"cfg_scale": 2.4, "num_steps": 25, "guidance_high": 0.9}


def run(out: pathlib.Path) -> dict:
    """All stages; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    vae_config = load_config("configs/vae.py:digits")
    side = vae_config.data.image_size
    with clock.stage("train autoencoder"):
        train(vae_config, str(out / "vae"))
    with clock.stage("extract latents"):
        vae = api.load_vae(str(out / "vae"))
        source = data.make_source("digits:train")
        folder = str(out / "latents")
        extract_latents.extract(vae, source, folder, image_size=side, shard_size=512)
    with clock.stage("train flowar"):
        overrides = [f"--config.data.source=latents:{out / 'latents'}"]
        overrides.append(f"--config.vae.path={out / 'vae'}")
        train(load_config("configs/flowar.py:digits", overrides), str(out / "flowar"))
    with clock.stage("sample"):
        flowar = api.load_flowar(str(out / "flowar"))
        labels = np.repeat(np.arange(10), SAMPLES_A_CLASS)
        latents = generate.sample(flowar, labels, batch_size=100, **SAMPLING)
        images = np.asarray(pixels.to_uint8(vae.decode(latents)))
    with clock.stage("evaluate"):
        held_out = np.stack([x["image"] for x in data.make_source("digits:test")])
        held_out = _resized(held_out, side)
        restored = reconstruct(vae, held_out)
        figures = {
            "vae_psnr": float(np.mean(pixels.psnr(restored, pixels.to_float(held_out)))),
            "accuracy": digits.accuracy(images, labels),
        }
        shown = draw(vae, flowar, held_out, restored, images, latents)
    figures["seconds"] = clock.seconds
    write_report(out, figures, shown)
    return figures


def _resized(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [B, S, S, 3] -> [B, side, side, 3] by area averages, as the source's crops are."""
    matrix = interpolation.area_matrix(images.shape[1], side)
    return np.asarray(interpolation.apply_matrices(images, matrix, matrix)).round().astype(np.uint8)


def reconstruct(vae: "api.VAE", images: np.ndarray) -> np.ndarray:
    """Images by way of the posterior's mean: float32 [B, S, S, 3]."""
    return vae.decode(vae.encode(images))


def draw(vae, flowar, held_out, restored, images, latents) -> dict[str, np.ndarray]:
    """The pictures of the report, by caption: uint8 [H, W, 3]."""
    by_class = images.reshape(10, SAMPLES_A_CLASS, *images.shape[1:])[:, :8].swapaxes(0, 1)
    first = latents.reshape(10, SAMPLES_A_CLASS, *latents.shape[1:])[:, 0]
    scales = flowar.config.scales
    coarse = np.concatenate([_at_scale(vae, first, side) for side in scales])
    some = np.concatenate([held_out[:12], np.asarray(pixels.to_uint8(restored[:12]))])
    return {
        "Held-out digits and their reconstructions": pictures.grid(
            some, columns=12, scale=2, row_captions=["original", "reconstructed"]
        ),
        "Generated digits, one column per class": pictures.grid(
            by_class.reshape(-1, *images.shape[1:]),
            columns=10,
            scale=2,
            column_captions=[str(i) for i in range(10)],
        ),
        "Generated latents reduced to each scale, enlarged and decoded": pictures.grid(
            coarse, columns=10, scale=2, row_captions=[f"{side} x {side}" for side in scales]
        ),
    }


def _at_scale(vae: "api.VAE", latents: np.ndarray, side: int) -> np.ndarray:
    """Latents as one scale shows them, decoded: uint8 [B, R, R, 3]."""
    finest = latents.shape[1]
    low = grids.reduce_to(jnp.asarray(latents), side).reshape(len(latents), side, side, -1)
    enlarged = interpolation.enlarge(low, finest)
    return np.asarray(pixels.to_uint8(vae.decode(np.asarray(enlarged))))


def table(figures: dict) -> list[tuple[str, str]]:
    """The figures as rows for people."""
    rows = [
        ("PSNR of held-out digits, autoencoder", f"{figures['vae_psnr']:.2f} dB"),
        ("generated digits of the asked class", f"{figures['accuracy']:.1%}"),
    ]
    return rows + stages.seconds_table(figures["seconds"])


def write_report(out: pathlib.Path, figures: dict, shown: dict[str, np.ndarray]) -> None:
    """figures.json, the pictures as PNG, and report.html, each atomically."""
    runs = {name: {name: report.read_metrics(out / name)} for name in ("vae", "flowar")}
    flowar_names = [name for name in runs["flowar"]["flowar"][-1] if name.startswith("loss")]
    parts = [
        "<p>Everything below comes from one run on scikit-learn's handwritten digits: trained, "
        "sampled and measured on this machine.</p>",
        report.table_html(table(figures)),
        *(report.figure_html(caption, report.png(image)) for caption, image in shown.items()),
        report.figure_html(
            "Training of the autoencoder",
            report.curves(runs["vae"], ["loss/mse", "kl", "psnr", "latent_std"]),
        ),
        report.figure_html("Training of FlowAR", report.curves(runs["flowar"], flowar_names)),
    ]
    for name, image in zip(("reconstructions", "samples", "scales"), shown.values(), strict=True):
        pictures.save_png(out / f"{name}.png", image)
    write_atomically(out / "report.html", report.page("FlowAR on digits", parts).encode())
    write_atomically(out / "figures.json", json.dumps(figures, indent=2).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo flowar", "runs/demo-flowar", run, table)


if __name__ == "__main__":
    sys.exit(main())
