"""The whole chain on real handwritten digits: image -> tokenizer -> codes -> generator -> image.

    detailflow demo --out runs/demo

Trains a tokenizer, extracts codes, trains a generator, samples, and writes report.html and
figures.json. Every stage resumes: the same command continues where it was stopped.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from detailflow_jax import data
from detailflow_jax.demo import stages
from detailflow_jax.demo.stages import Grid
from detailflow_jax.evaluate import digits, reconstruction, report
from detailflow_jax.evaluate.models import Reconstructor
from detailflow_jax.inference import api, extract_codes, generate
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.runtime import platforms, sharding
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks.tokenizer import group_counts
from detailflow_jax.train import train

CFG_SCALE = 1.5
NOISY_GROUP = 1  # The second group is the first one that is written in one step.


def run(out: pathlib.Path) -> dict:
    """All stages; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    with clock.stage("train tokenizer"):
        config = load_config(f"configs/tokenizer.py:{stages.DIGITS}")
        train(config, str(out / "tokenizer"))
    with clock.stage("extract codes"):
        tokenizer = api.load_tokenizer(str(out / "tokenizer"))
        source = data.make_source(f"{stages.DIGITS}:train")
        noise = {"noise_top": config.correction.noise_top}
        folder = str(out / "codes")
        extract_codes.extract(tokenizer, source, folder, crops="five", shard_size=512, **noise)
    with clock.stage("train generator"):
        overrides = [f"--config.data.source=codes:{out / 'codes'}"]
        train(
            load_config(f"configs/generator.py:{stages.DIGITS}", overrides), str(out / "generator")
        )
    with clock.stage("sample"):
        generator = api.load_generator(str(out / "generator"))
        codes = generate.sample(generator, stages.LABELS, batch_size=100, cfg_scale=CFG_SCALE)
        images = api.to_uint8(tokenizer.decode(codes))
    runs = {name: report.read_metrics(out / name) for name in ("tokenizer", "generator")}
    with clock.stage("evaluate"):
        held_out, labels = digits.load(f"{stages.DIGITS}:test", tokenizer.config.image_size)
        counts = group_counts(tokenizer.config)
        damaged = damage(tokenizer, held_out, config.correction.noise_top)
        restored = api.to_uint8(tokenizer.decode(tokenizer.encode(held_out)))
        figures = {
            "psnr_by_tokens": reconstruction.psnr_by_tokens(tokenizer, held_out, counts),
            "psnr_of_damaged": {
                kind: reconstruction.mean_psnr(made, held_out) for kind, made in damaged.items()
            },
            "codebook_usage": runs["tokenizer"][-1]["codebook_usage"],
            **stages.judge(images, restored, held_out, labels),
        }
        grids = draw(tokenizer, held_out, labels, damaged, codes, images)
    figures["seconds"] = clock.seconds
    sections = page(figures, grids, counts, runs, out)
    stages.write_report(out, "DetailFlow on handwritten digits", figures, grids, sections)
    return figures


def damage(
    tokenizer: "api.Tokenizer", images: np.ndarray, noise_top: int
) -> Mapping[str, np.ndarray]:
    """Images whose second group of tokens is replaced by others: "noisy" and "corrected"."""
    mesh = sharding.make_mesh({})
    reconstructor = Reconstructor(tokenizer, mesh, batch_size=64, noise_top=noise_top)
    made = reconstructor(images, [], [NOISY_GROUP], indices=np.arange(len(images)))
    return {kind: made[f"group {NOISY_GROUP} {kind}"] for kind in ("noisy", "corrected")}


def draw(
    tokenizer: "api.Tokenizer",
    held_out: np.ndarray,
    labels: np.ndarray,
    damaged: Mapping[str, np.ndarray],
    codes: np.ndarray,
    images: np.ndarray,
) -> dict[str, Grid]:
    """The pictures of the report."""
    counts = group_counts(tokenizer.config)
    names = [str(count) for count in counts]

    def strip(codes: np.ndarray) -> np.ndarray:
        """Rows of more and more tokens, uint8 [counts * B, R, R, 3]."""
        return api.to_uint8(np.concatenate([decode_enlarged(tokenizer, codes, n) for n in counts]))

    real = stages.one_of_each(held_out, labels)
    kinds = [stages.one_of_each(damaged[kind], labels) for kind in ("noisy", "corrected")]
    restored = strip(tokenizer.encode(real))
    return {
        "samples": stages.samples_grid(images),
        "progressive": Grid(strip(stages.by_class(codes)[:, 0]), names, "tokens"),
        "reconstructions": Grid(np.concatenate([restored, real]), [*names, "real"], "tokens"),
        "correction": Grid(
            np.concatenate([real, *kinds]), ["real", "wrong", "corrected"], heads=stages.NAMES
        ),
    }


def page(
    figures: dict,
    grids: Mapping[str, Grid],
    counts: Sequence[int],
    runs: Mapping[str, list[dict[str, float]]],
    out: pathlib.Path,
) -> dict[str, list[str]]:
    """The sections of the page."""
    group, every = counts[0], counts[-1]
    damaged = figures["psnr_of_damaged"]

    curves = functools.partial(stages.curves, runs)
    return {
        "Digits that it wrote": grids["samples"].section(stages.judged_text(figures)),
        "What a token adds": grids["progressive"].section(
            f"Each digit is a sequence of {every} tokens, and each row shows the same digits from "
            f"the first {', '.join(map(str, counts[:-1]))} and all {every} of them. The first "
            f"{group} tokens say where the ink is, and every further {group} sharpen it.",
        ),
        "Real digits as tokens": grids["reconstructions"].section(
            "The last row are digits that nothing was trained on; above it is what their tokens "
            "keep of them.",
        ),
        "What correction is": grids["correction"].section(
            f"The generator writes {group} tokens at once, so some of them will not fit "
            "together. In the middle row the second group was replaced by other tokens; in the "
            f"last row the groups after it know that, and make up for it as far as they can "
            f"({damaged['noisy']:.2f} dB becomes {damaged['corrected']:.2f} dB).",
        ),
        "Figures": [report.table_html(table(figures))],
        "Training of the tokenizer": [
            curves(
                "tokenizer",
                {
                    "loss": "Loss, all terms",
                    "loss/mse": "Squared error of the pixels",
                    "codebook_usage": "Share of the codes that are in use",
                },
            ),
            report.text_html(
                "The loss may fall below 0: one of its terms is the uncertainty about each single "
                "token minus the variety of all tokens, and that is below 0 when every choice is "
                "sure and many different codes are chosen."
            ),
        ],
        "Training of the generator": [
            curves("generator", {"loss": "Loss (nats per token)", "accuracy": "Tokens guessed"})
        ],
        stages.NEXT: [
            report.commands_html(
                {
                    "More digits, from fewer and more tokens:": "detailflow generate "
                    f"--tokenizer {out}/tokenizer --generator {out}/generator --labels 3,7 "
                    f"--per_class 8 --cfg_scale {CFG_SCALE} --num_tokens "
                    f"{','.join(map(str, counts))} --out runs/samples",
                    "The other system, FlowAR, on the same digits:": "make demo-flowar",
                    "Your own images, one folder per class:": "detailflow train --config "
                    "configs/tokenizer.py:small:image_size=64 --workdir runs/tok "
                    "--config.data.source=folder:photos",
                }
            )
        ],
    }


def table(figures: dict) -> stages.Rows:
    """The figures as rows for people."""
    damaged = figures["psnr_of_damaged"]
    return [
        *stages.judged_rows(figures),
        *(
            (f"Held-out digits from {n} tokens, PSNR", f"{value:.2f} dB")
            for n, value in figures["psnr_by_tokens"].items()
        ),
        ("With a wrong second group, PSNR", f"{damaged['noisy']:.2f} dB"),
        ("The same, corrected by the later groups", f"{damaged['corrected']:.2f} dB"),
        ("Codes of the codebook in use", f"{figures['codebook_usage']:.1%}"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo", "runs/demo", run, table)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
