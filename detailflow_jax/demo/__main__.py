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
from detailflow_jax.inference import api, extract_codes, generate
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.runtime import platforms
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks.tokenizer import group_counts
from detailflow_jax.train import train

DIGITS = "mnist"
"""The set that is learned, a source and a variant of the configurations."""
SAMPLING = {"cfg_scale": 1.5, "temperature": 0.3}


def run(out: pathlib.Path, seed: int) -> dict:
    """All stages; returns the figures that figures.json holds."""
    clock = stages.Stages(out)
    with clock.stage("train tokenizer"):
        overrides = [f"--config.seed={seed}"]
        train(load_config(f"configs/tokenizer.py:{DIGITS}", overrides), str(out / "tokenizer"))
    with clock.stage("extract codes"):
        tokenizer = api.load_tokenizer(str(out / "tokenizer"))
        source = data.make_source(f"{DIGITS}:train")
        folder = str(out / "codes")
        extract_codes.extract(tokenizer, source, folder, seed=seed, crops="five", shard_size=512)
    with clock.stage("train generator"):
        overrides.append(f"--config.data.source=codes:{out / 'codes'}")
        train(load_config(f"configs/generator.py:{DIGITS}", overrides), str(out / "generator"))
    with clock.stage("sample"):
        generator = api.load_generator(str(out / "generator"))
        codes = generate.sample(generator, stages.LABELS, batch_size=100, seed=seed, **SAMPLING)
        images = api.to_uint8(tokenizer.decode(codes))
    runs = {name: report.read_metrics(out / name) for name in ("tokenizer", "generator")}
    with clock.stage("evaluate"):
        held_out, labels = digits.load(f"{DIGITS}:test", tokenizer.config.image_size)
        counts = group_counts(tokenizer.config)
        restored = api.to_uint8(tokenizer.decode(tokenizer.encode(held_out)))
        figures = {
            "psnr_by_tokens": reconstruction.psnr_by_tokens(tokenizer, held_out, counts),
            "codebook_usage": runs["tokenizer"][-1]["codebook_usage"],
            **stages.judge(DIGITS, images, restored, held_out, labels),
        }
        grids = draw(tokenizer, held_out, labels, codes, images)
    figures["seconds"] = clock.seconds
    sections = page(figures, grids, counts, runs, out)
    stages.write_report(out, "DetailFlow on handwritten digits", figures, grids, sections)
    return figures


def draw(
    tokenizer: "api.Tokenizer",
    held_out: np.ndarray,
    labels: np.ndarray,
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
    restored = strip(tokenizer.encode(real))
    return {
        "samples": stages.samples_grid(images),
        "progressive": Grid(strip(stages.by_class(codes)[:, 0]), names, "tokens"),
        "reconstructions": Grid(np.concatenate([restored, real]), [*names, "real"], "tokens"),
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
    curves = functools.partial(stages.curves, runs)
    options = " ".join(f"--{name} {value}" for name, value in SAMPLING.items())
    return {
        "Digits that it wrote": grids["samples"].section(stages.judged_text(figures)),
        "What a token adds": grids["progressive"].section(
            f"Each digit is a sequence of {every} tokens, and each row shows the same digits from "
            f"the first {', '.join(map(str, counts[:-1]))} and all {every} of them. The first "
            f"{group} tokens say where the ink is, and every further {group} sharpen it.",
        ),
        "Real digits as tokens": grids["reconstructions"].section(
            "The last row shows digits that nothing was trained on, above it is what their tokens "
            "keep of them.",
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
                    f"--per_class 8 {options} --num_tokens "
                    f"{','.join(map(str, counts))} --out runs/samples",
                    "The other system, FlowAR:": "make demo-flowar",
                    **stages.OWN_IMAGES,
                }
            )
        ],
    }


def table(figures: dict) -> stages.Rows:
    """The figures as rows for people."""
    return [
        *stages.judged_rows(figures),
        *(
            (f"Held-out digits from {n} tokens, PSNR", f"{value:.2f} dB")
            for n, value in figures["psnr_by_tokens"].items()
        ),
        ("Codes of the codebook in use", f"{figures['codebook_usage']:.1%}"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints the table."""
    return stages.main(argv, "demo", "runs/demo", run, table)


if __name__ == "__main__":
    platforms.choose(tell=True)
    sys.exit(main())
