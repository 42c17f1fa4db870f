"""FlowAR on real handwritten digits: image -> autoencoder -> latents -> FlowAR -> image.

    detailflow demo flowar --out runs/demo-flowar

Trains an autoencoder, caches latents, trains FlowAR on them, samples, and writes report.html and
figures.json. Every stage resumes: the same command continues where it was stopped.
"""

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
from detailflow_jax.runtime import pictures, platforms
from detailflow_jax.runtime.config import load_config
from detailflow_jax.train import train

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
        latents = generate.sample(flowar, stages.LABELS, batch_size=100, **SAMPLING)
        images = api.to_uint8(vae.decode(latents))
    with clock.stage("evaluate"):
        # By area averages, as the crops of the source are.
        matrix = interpolation.area_matrix(32, side)
        held_out = interpolation.apply_matrices(stages.held_out_digits(), matrix, matrix)
        held_out = np.asarray(held_out).round().astype(np.uint8)
        restored = vae.decode(vae.encode(held_out))
        figures = {
            "vae_psnr": float(np.mean(pixels.psnr(restored, pixels.to_float(held_out)))),
            "accuracy": digits.accuracy(images, stages.LABELS),
        }
        shown = draw(vae, flowar, held_out[:12], restored[:12], images, latents)
    figures["seconds"] = clock.seconds
    vae_run, flowar_run = ({name: report.read_metrics(out / name)} for name in ("vae", "flowar"))
    losses = [name for name in flowar_run["flowar"][-1] if name.startswith("loss")]
    curves = {
        "Training of the autoencoder": report.curves(
            vae_run, ["loss/mse", "kl", "psnr", "latent_std"]
        ),
        "Training of FlowAR": report.curves(flowar_run, losses),
    }
    stages.write_report(out, "FlowAR on digits", figures, table(figures), shown, curves)
    return figures


def draw(vae, flowar, held_out, restored, images, latents) -> dict[str, tuple[str, np.ndarray]]:
    """The pictures of the report: name -> caption and uint8 [H, W, 3]."""
    first, scales = stages.by_class(latents)[:, 0], flowar.config.scales
    coarse = np.concatenate([_at_scale(vae, first, side) for side in scales])
    captions = [f"{side} x {side}" for side in scales]
    some, rows = np.concatenate([held_out, api.to_uint8(restored)]), ["original", "reconstructed"]
    return {
        "reconstructions": (
            "Held-out digits and their reconstructions",
            pictures.grid(some, columns=len(held_out), scale=2, row_captions=rows),
        ),
        "samples": ("Generated digits, one column per class", stages.class_grid(images)),
        "scales": (
            "Generated latents reduced to each scale, enlarged and decoded",
            pictures.grid(coarse, columns=10, scale=2, row_captions=captions),
        ),
    }


def _at_scale(vae: "api.VAE", latents: np.ndarray, side: int) -> np.ndarray:
    """Latents as one scale shows them, decoded: uint8 [B, R, R, 3]."""
    low = grids.reduce_to(jnp.asarray(latents), side).reshape(len(latents), side, side, -1)
    enlarged = interpolation.enlarge(low, latents.shape[1])
    return api.to_uint8(vae.decode(np.asarray(enlarged)))


def table(figures: dict) -> stages.Rows:
    """The figures as rows for people."""
    rows = [
        ("PSNR of held-out digits, autoencoder", f"{figures['vae_psnr']:.2f} dB"),
        ("generated digits of the asked class", f"{figures['accuracy']:.1%}"),
    ]
    return rows + stages.seconds_table(figures["seconds"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo flowar", "runs/demo-flowar", run, table)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
