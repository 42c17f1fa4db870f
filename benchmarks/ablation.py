"""The directions of the paper's ablation, on scikit-learn's handwritten digits.

    python benchmarks/ablation.py --seeds 3 --out runs/ablation

Each arm adds one thing to the arm above it, in the paper's order: tokenizer and generator are
trained anew for every arm and seed, and 1,000 digits are sampled. All arms train for equally many
steps on equally many images. What is measured:

    classifier   share of the sampled digits that a classifier of real ones assigns to their label
    distance     Fréchet distance of sampled and real digits (training and held out) in the
                 classifier's 64 features, pixels on the scale 0..16
    PSNR         of held-out digits, reconstructed from all tokens
    steps        of the generator for one image

Every run has a folder, OUT/seed0/baseline and so on. The same command again goes on where it was
stopped, and with more seeds adds theirs. OUT/ablation.json and OUT/ablation.md hold the table of
the seeds that have all arms; mean and sample standard deviation over seeds.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import measuring
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from detailflow_jax import data
from detailflow_jax.evaluate import digits, reconstruction
from detailflow_jax.evaluate.distances import frechet_distance, gaussian
from detailflow_jax.inference import api, extract_codes, generate
from detailflow_jax.models.generator import GeneratorConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.train import Preempted, train

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"

# ---------------------------------------------------------------------------------------- the arms

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row: fields of both configurations that differ from `digits`.

    Attributes:
      name: of its folder.
      title: of its row.
      tokenizer: full name of a field of the configuration -> value.
      generator: the same for the generator.
    """

    name: str
    title: str
    tokenizer: Fields
    generator: Fields

    def config(self, part: str, seed: int, steps: int, extra: Fields | None = None) -> ConfigDict:
        """The configuration of "tokenizer" or "generator"."""
        fields = {
            "seed": seed,
            "total_steps": steps,
            "optim.warmup_steps": steps // 10,
            # Only training counts here.
            "figures_every": 0,
            "keep_checkpoints": 1,
            "tensorboard": False,
        }
        fields |= {"tokenizer": self.tokenizer, "generator": self.generator}[part] | (extra or {})
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        return load_config(f"{CONFIGS / part}.py:digits", overrides)


def cumulative_arms() -> tuple[Arm, ...]:
    """The paper's arms but for alignment, whose teacher has no business with digits."""
    tokenizer: dict[str, Any] = {
        "model.causal_encoder": False,
        "model.group_size": 1,
        "full_probability": 1.0,
        "correction.enabled": False,
    }
    generator: dict[str, Any] = {"model.group_size": 1, "loss.correction": 0.0}
    arms = [Arm("baseline", "baseline", dict(tokenizer), dict(generator))]

    def add(name: str, title: str, to_tokenizer: Fields, to_generator: Fields) -> None:
        tokenizer.update(to_tokenizer)
        generator.update(to_generator)
        arms.append(Arm(name, f"+ {title}", dict(tokenizer), dict(generator)))

    parallel = {"model.group_size": 4, "model.causal_num": 0}
    causal_first = {"model.causal_num": 4}
    add("causal_encoder", "causal encoder", {"model.causal_encoder": True}, {})
    add("coarse_to_fine", "coarse-to-fine training", {"full_probability": 0.8}, {})
    add("parallel", "parallel groups of 4", parallel, parallel)
    add("correction", "self-correction", {"correction.enabled": True}, {"loss.correction": 0.3})
    add("causal_first_group", "first group causal", causal_first, causal_first)
    return tuple(arms)


ARMS = cumulative_arms()

# ---------------------------------------------------------------------------------------- one run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
      tokenizer_steps: updates of 32 digits.
      generator_steps: updates of 64 sequences of codes.
      crops: views of each training digit whose codes the generator learns.
      samples: sampled digits, equally many of each.
      cfg_scale: guidance.
    """

    tokenizer_steps: int = 500
    generator_steps: int = 550
    crops: str = "five"
    samples: int = 1000
    cfg_scale: float = 1.5

    def scaled(self, scale: float) -> "Settings":
        """The same with longer or shorter training."""
        lengths = {name: getattr(self, name) for name in ("tokenizer_steps", "generator_steps")}
        longer = {name: max(10, round(scale * count)) for name, count in lengths.items()}
        return dataclasses.replace(self, **longer)


def run(arm: Arm, seed: int, settings: Settings, out: pathlib.Path) -> dict[str, float]:
    """Trains, samples and measures one arm with one seed; resumes what is in `out`.

    Returns:
      its figures, which OUT/result.json holds from then on.

    Raises:
      ConfigError: the folder holds a run with other settings.
    """
    path, definition = out / "result.json", dataclasses.asdict(settings) | {"seed": seed}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] != definition:
            raise ConfigError(
                f"{path} was made with {stored['settings']}, asked for are {definition}: take "
                "another --out"
            )
        return stored["figures"]
    train(arm.config("tokenizer", seed, settings.tokenizer_steps), str(out / "tokenizer"))
    tokenizer = api.load_tokenizer(str(out / "tokenizer"))
    source = data.make_source("digits:train")
    extract_codes.extract(tokenizer, source, str(out / "codes"), crops=settings.crops, seed=seed)
    codes = {"data.source": f"codes:{out / 'codes'}"}
    train(arm.config("generator", seed, settings.generator_steps, codes), str(out / "generator"))
    generator = api.load_generator(str(out / "generator"))
    figures = measure(tokenizer, generator, seed, settings)
    content = {"settings": definition, "figures": figures}
    write_atomically(path, json.dumps(content, indent=2).encode())
    return figures


def measure(
    tokenizer: api.Tokenizer, generator: api.Generator, seed: int, settings: Settings
) -> dict[str, float]:
    """The figures of a trained pair, by name."""
    labels = np.arange(settings.samples) % 10
    codes = generate.sample(
        generator, labels, batch_size=100, seed=seed, cfg_scale=settings.cfg_scale
    )
    images = np.asarray(pixels.to_uint8(tokenizer.decode(codes, batch_size=100)))
    held_out, num_tokens = pictures("test"), generator.config.num_tokens
    real = np.concatenate([pictures("train"), held_out])
    psnr = reconstruction.psnr_by_tokens(tokenizer, held_out, [num_tokens])
    return {
        "classifier": digits.accuracy(images, labels),
        "distance": distance(images, real),
        "psnr": psnr[num_tokens],
        "steps": steps(generator.config),
    }


def steps(config: GeneratorConfig) -> int:
    """Steps of the sampler for all tokens: the causal ones singly, then whole groups."""
    return config.causal + (config.num_tokens - config.causal) // config.group_size


def pictures(split: str) -> np.ndarray:
    """All digits of a split: uint8 [B, 32, 32, 3]."""
    return np.stack([example["image"] for example in data.make_source(f"digits:{split}")])


def distance(images: np.ndarray, real: np.ndarray) -> float:
    """Fréchet distance in the classifier's features between two sets uint8 [B, S, S, 3]."""
    first, second = (gaussian([digits.to_features(x)]) for x in (images, real))
    return frechet_distance(*first, *second)


# --------------------------------------------------------------------------------------- the table

COLUMNS = {
    # figure: its heading and format
    "steps": ("steps", "{:.0f}"),
    "classifier": ("classifier", "{:.1%}"),
    "distance": ("distance", "{:.2f}"),
    "psnr": ("PSNR (dB)", "{:.2f}"),
}


def summary(results: Mapping[int, Mapping[str, Fields]]) -> dict[str, dict[str, tuple]]:
    """{seed: {arm: figures}} -> {arm: {figure: (mean, standard deviation)}}."""
    return {
        arm.name: {
            figure: spread([found[arm.name][figure] for found in results.values()])
            for figure in COLUMNS
        }
        for arm in ARMS
    }


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value does not have."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def table(found: Mapping[str, Mapping[str, tuple]]) -> list[tuple[str, ...]]:
    """The rows of the table, the first one its heading."""
    rows = [("", *(heading for heading, _ in COLUMNS.values()))]
    for arm in ARMS:
        cells = []
        for figure, (_, form) in COLUMNS.items():
            mean, deviation = found[arm.name][figure]
            cell = form.format(mean)
            if deviation is not None and figure != "steps":
                cell += f" ± {form.format(deviation)}"
            cells.append(cell)
        rows.append((arm.title, *cells))
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "-|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def describe(settings: Settings, seeds: Sequence[int]) -> str:
    """One sentence on what stands behind the figures."""
    return (
        f"{settings.tokenizer_steps} steps of the tokenizer, {settings.generator_steps} of the "
        f"generator, {settings.samples} samples with guidance {settings.cfg_scale:g}, "
        f"seeds {', '.join(map(str, seeds))}; mean ± standard deviation over the seeds"
    )


def write_table(
    out: pathlib.Path, settings: Settings, results: Mapping[int, Mapping[str, Fields]]
) -> str:
    """Writes ablation.json and ablation.md; returns the table as text."""
    found = summary(results)
    rows, about = table(found), describe(settings, list(results))
    content = {"settings": dataclasses.asdict(settings), "summary": found, "runs": results}
    write_atomically(out / "ablation.json", json.dumps(content, indent=2).encode())
    write_atomically(out / "ablation.md", f"{markdown(rows)}\n{about}.\n".encode())
    return f"{measuring.columns(rows)}\n{about}"


# ---------------------------------------------------------------------------------------- the door


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/ablation", help="folder (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    add("--scale", type=float, default=1.0, help="lengthens both trainings (default: %(default)g)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not args.scale > 0:
        parser.error("--seeds must be at least 1, and --scale above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and prints the table; returns the exit code."""
    args = parse(argv)
    out, settings = pathlib.Path(args.out), Settings().scaled(args.scale)
    results: dict[int, dict[str, dict[str, float]]] = {}
    try:
        with tqdm(total=args.seeds * len(ARMS), unit="run") as progress:
            for seed in range(args.seeds):
                found = {}
                for arm in ARMS:
                    progress.set_description(f"seed {seed}, {arm.name}")
                    found[arm.name] = run(arm, seed, settings, out / f"seed{seed}" / arm.name)
                    progress.update()
                results[seed] = found
                text = write_table(out, settings, results)
    except (ConfigError, Preempted) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}\n\ntable: {out / 'ablation.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
