"""FlowAR on real handwritten digits: image -> autoencoder -> latents -> FlowAR -> image.

    detailflow demo flowar --out runs/demo-flowar

Trains an autoencoder, caches latents, trains FlowAR on them, samples, and writes report.html and
figures.json. Every stage resumes: the same command continues where it was stopped.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from detailflow_jax import data
from detailflow_jax.demo import stages
from detailflow_jax.demo.stages import Grid
from detailflow_jax.evaluate import digits, reconstruction, report
from detailflow_jax.inference import api, extract_latents, generate
from detailflow_jax.ops import interpolation
from detailflow_jax.ops import scales as grids
from detailflow_jax.runtime import platforms
from detailflow_jax.runtime.config import load_config
from detailflow_jax.train import train

DIGITS = "mnist"
"""The set that is learned, a source and a variant of the configurations."""
SAMPLING = {"cfg_scale": 4.0, "num_steps": 15, "guidance_high": 1.0}


def run(out: pathlib.Path, seed: int) -> dict:
    """All stages; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    overrides = [f"--config.seed={seed}"]
    vae_config = load_config(f"configs/vae.py:{DIGITS}", overrides)
    side = vae_config.data.image_size
    with clock.stage("train autoencoder"):
        train(vae_config, str(out / "vae"))
    with clock.stage("extract latents"):
        vae = api.load_vae(str(out / "vae"))
        source = data.make_source(f"{DIGITS}:train")
        folder = str(out / "latents")
        extract_latents.extract(vae, source, folder, image_size=side, shard_size=512)
    with clock.stage("train flowar"):
        overrides.append(f"--config.data.source=latents:{out / 'latents'}")
        overrides.append(f"--config.vae.path={out / 'vae'}")
        train(load_config(f"configs/flowar.py:{DIGITS}", overrides), str(out / "flowar"))
    with clock.stage("sample"):
        flowar = api.load_flowar(str(out / "flowar"))
        latents = generate.sample(flowar, stages.LABELS, batch_size=100, seed=seed, **SAMPLING)
        images = api.to_uint8(vae.decode(latents))
    with clock.stage("evaluate"):
        held_out, labels = digits.load(f"{DIGITS}:test", side)
        restored = api.to_uint8(vae.decode(vae.encode(held_out)))
        figures = {
            "vae_psnr": reconstruction.mean_psnr(restored, held_out),
            **stages.judge(DIGITS, images, restored, held_out, labels),
        }
        drawn = draw(vae, flowar.config.scales, held_out, labels, restored, images, latents)
    figures["seconds"] = clock.seconds
    runs = {name: report.read_metrics(out / name) for name in ("vae", "flowar")}
    sections = page(figures, drawn, flowar.config.scales, runs, out)
    stages.write_report(out, "FlowAR on handwritten digits", figures, drawn, sections)
    return figures


def draw(vae, scales, held_out, labels, restored, images, latents) -> dict[str, Grid]:
    """The pictures of the report."""
    first = stages.by_class(latents)[:, 0]
    coarse = np.concatenate([_at_scale(vae, first, side) for side in scales])
    pair = [stages.one_of_each(x, labels) for x in (restored, held_out)]
    return {
        "samples": stages.samples_grid(images),
        "scales": Grid(coarse, [f"{side} x {side}" for side in scales]),
        "reconstructions": Grid(np.concatenate(pair), ["restored", "real"]),
    }


def _at_scale(vae: "api.VAE", latents: np.ndarray, side: int) -> np.ndarray:
    """Latents as one scale shows them, decoded: uint8 [B, R, R, 3]."""
    low = grids.reduce_to(jnp.asarray(latents), side).reshape(len(latents), side, side, -1)
    enlarged = interpolation.enlarge(low, latents.shape[1])
    return api.to_uint8(vae.decode(np.asarray(enlarged)))


def page(
    figures: dict,
    drawn: Mapping[str, Grid],
    scales: Sequence[int],
    runs: Mapping[str, list[dict[str, float]]],
    out: pathlib.Path,
) -> dict[str, list[str]]:
    """The sections of the page."""
    curves = functools.partial(stages.curves, runs)
    sides = ", ".join(map(str, scales))
    options = " ".join(f"--{name} {value}" for name, value in SAMPLING.items())
    return {
        "Digits that it wrote": drawn["samples"].section(stages.judged_text(figures)),
        "What a scale adds": drawn["scales"].section(
            f"FlowAR writes an image {len(scales)} times over, with {sides} places a side: each "
            "time it sees the coarser one and turns noise into the finer one. The rows show the "
            "same digits as each of these scales has them. The first ones say little by "
            "themselves: the autoencoder has never seen codes as smooth as these.",
        ),
        "Real digits through the autoencoder": drawn["reconstructions"].section(
            "FlowAR does not write pixels but the short code of an autoencoder. The last row shows "
            "digits that nothing was trained on, the first one what their codes keep of them.",
        ),
        "Figures": [report.table_html(table(figures))],
        "Training of the autoencoder": [
            curves("vae", {"loss/mse": "Squared error of the pixels", "psnr": "PSNR (dB)"})
        ],
        "Training of FlowAR": [curves("flowar", {"loss": "Squared error of the velocity"})],
        stages.NEXT: [
            report.commands_html(
                {
                    "More digits:": f"detailflow generate --vae {out}/vae --flowar {out}/flowar "
                    f"--labels 3,7 --per_class 8 {options} --out runs/samples",
                    "The other system, DetailFlow:": "make demo",
                    "Your own images, one folder per class:": "detailflow train --config "
                    "configs/vae.py:small:image_size=64 --workdir runs/vae "
                    "--config.data.source=folder:photos",
                }
            )
        ],
    }


def table(figures: dict) -> stages.Rows:
    """The figures as rows for people."""
    psnr = f"{figures['vae_psnr']:.2f} dB"
    return [*stages.judged_rows(figures), ("Held-out digits through the autoencoder, PSNR", psnr)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo flowar", "runs/demo-flowar", run, table)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
