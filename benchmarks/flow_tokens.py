"""What a flow head on detail tokens gives, against logits, on scikit-learn's handwritten digits.

    python benchmarks/flow_tokens.py --out runs/flow_tokens

One tokenizer, one set of codes, and for every seed five generators of the same transformer, all
trained for equally many steps with Muon: with logits and one token a step; with logits and groups
of four, with and without correction pairs; with a flow head and the same groups, with and without.
What is measured of the samples:

    classifier   share that a classifier of real digits assigns to the label asked for
    distance     Fréchet distance to all real digits in the classifier's features (8x8 grey values)
    pixels       the same in the features of `detailflow evaluate --features pixels`
    decoded      the same to what the tokenizer makes of all real digits: the generator's own part
    ms           of the sampler for one image, in batches of 100, compiled before; least of three

The first row is what the tokenizer makes of the real digits: no generator can be expected to be
better. The same command goes on where it was stopped. OUT/flow_tokens.md holds the table; mean and
sample standard deviation over seeds.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import digit_figures
import measuring
import numpy as np
from ablation import markdown, spread
from ml_collections import ConfigDict

from detailflow_jax import data
from detailflow_jax.evaluate.distances import frechet_distance, gaussian
from detailflow_jax.evaluate.networks import pixel_extractor
from detailflow_jax.evaluate.references import open_images
from detailflow_jax.inference import api, extract_codes
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.tasks import make_task
from detailflow_jax.train import train

BATCH, SIDE = 100, 32
FLOW_STEPS = (4, 8, 16, 25)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A generator: its title, variant, and fields that differ from it."""

    title: str
    variant: str
    fields: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """How it is sampled: what its row adds to the title -> settings."""
        if self.variant == "digits":
            return {"": {}}
        counts = {f", {n} flow steps": {"num_steps": n} for n in FLOW_STEPS}
        return counts | {", 25, kept continuous": {"num_steps": 25, "continuous": True}}


ARMS = {
    "single": Arm("logits, token by token", "digits", {"model.causal_num": 16}),
    "groups": Arm("logits, groups", "digits", {}),
    "groups_corrected": Arm("logits, groups, correction", "digits", {"loss.correction": 0.3}),
    "flow": Arm("flow, groups", "digits:head=flow", {}),
    "flow_corrected": Arm("flow, groups, correction", "digits:head=flow", {"loss.correction": 0.3}),
}
COLUMNS = {
    "classifier": "{:.1%}",
    "distance": "{:.2f}",
    "pixels": "{:.2f}",
    "decoded": "{:.2f}",
    "ms": "{:.1f}",
}


def config_of(arm: Arm, seed: int, steps: int, batch_size: int, codes: pathlib.Path) -> ConfigDict:
    """The configuration of a training."""
    own = {"data.source": f"codes:{codes}", "model.num_classes": 10, "loss.correction": 0.0}
    own |= {"optim.kind": "muon", "optim.lr": 2e-3, "optim.final": 0.0}  # for short runs
    fields = {**own, "batch_size": batch_size, **arm.fields}
    return digit_figures.config(f"generator:{arm.variant}", seed, steps, fields)


def train_arm(arm: Arm, config: ConfigDict, out: str) -> api.Generator:
    """The trained generator of an arm."""
    if config.model.causal_num is None:
        train(config, out)
    else:  # Another order of steps than the tokenizer's, which a run refuses by itself.
        iterator = data.make_iterator(config.data, batch_size=config.batch_size, seed=config.seed)
        train(config, out, make_task(config), iterator)
    return api.load_generator(out)


class Figures:
    """The figures of images, against all real digits and what the tokenizer makes of them."""

    def __init__(self, tokenizer: api.Tokenizer):
        images = open_images("digits:train", SIDE, None)
        self.extractor = pixel_extractor(images, BATCH)
        self.real = np.concatenate([digit_figures.pictures(x) for x in ("train", "test")])
        self.restored = api.to_uint8(tokenizer.decode(tokenizer.encode(self.real)))
        sets = {"pixels": self.real, "decoded": self.restored}
        self.references = {name: gaussian([self.features(x)]) for name, x in sets.items()}

    def features(self, images: np.ndarray) -> np.ndarray:
        """Pixels after a principal component analysis."""
        return self.extractor(images)["pool"]

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """`classifier`, `distance`, `pixels` and `decoded`."""
        made = gaussian([self.features(images)])
        distances = {
            name: float(frechet_distance(*reference, *made))
            for name, reference in self.references.items()
        }
        return {**digit_figures.of_samples(images, labels), **distances}


def measure(
    generator: api.Generator, tokenizer: api.Tokenizer, figures: Figures, count: int,
    settings: Mapping[str, Any], seed: int,
) -> dict[str, float]:  # fmt: skip
    """The figures of one way to sample."""
    labels = np.arange(count) % 10

    def sample(labels: np.ndarray) -> np.ndarray:
        return generator.sample(labels, seed, 1.5, batch_size=BATCH, **settings)

    made = sample(labels)
    best, _ = measuring.least_seconds({"sample": lambda: sample(labels[:BATCH])}, 3)
    images = api.to_uint8(tokenizer.decode(made, batch_size=BATCH))
    return {**figures(images, labels), "ms": 1000 * best["sample"] / BATCH}


def run(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """{row: figures of each seed}; what was measured before is read."""
    out = pathlib.Path(args.out)
    path = args.tokenizer or str(out / "tokenizer")
    if not args.tokenizer:
        train(digit_figures.config("tokenizer", 0, args.tokenizer_steps, {}), path)
    tokenizer = api.load_tokenizer(path)
    extract_codes.extract(
        tokenizer, data.make_source("digits:train"), str(out / "codes"), crops="five"
    )
    figures = Figures(tokenizer)
    labels = np.concatenate([labels_of(split) for split in ("train", "test")])
    restored = figures(figures.restored, labels) | {"ms": 0.0}
    rows = {"real digits by way of the tokenizer": [restored]}
    for seed in range(args.seeds):
        for name, arm in ARMS.items():
            folder = out / f"seed{seed}" / name
            path = folder / "figures.json"
            if not path.exists():
                config = config_of(arm, seed, args.steps, args.batch_size, out / "codes")
                generator = train_arm(arm, config, str(folder))
                found = {
                    arm.title + row: measure(
                        generator, tokenizer, figures, args.samples, settings, seed
                    )
                    for row, settings in arm.settings.items()
                }
                write_atomically(path, json.dumps(found, indent=1).encode())
            for row, values in json.loads(path.read_text()).items():
                rows.setdefault(row, []).append(values)
                print(f"seed {seed}  {row}  {values}", flush=True)
    return rows


def labels_of(split: str) -> np.ndarray:
    """Labels of all digits of a split."""
    return np.array([example["label"] for example in data.make_source(f"digits:{split}")])


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[tuple[str, ...]]:
    """The rows of the table, the first one its heading."""
    lines = [("", *COLUMNS)]
    for row, seeds in rows.items():
        cells = []
        for column, form in COLUMNS.items():
            mean, deviation = spread([found[column] for found in seeds])
            cells.append(form.format(mean) + (f" ± {form.format(deviation)}" if deviation else ""))
        lines.append((row, *cells))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", help="a workdir of configs/tokenizer.py:digits (default: one is trained)")
    add("--tokenizer_steps", type=int, default=500, help="of that one (default: %(default)s)")
    add("--out", default="runs/flow_tokens", help="folder (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    add("--steps", type=int, default=550, help="of each generator (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="of each generator (default: %(default)s)")
    add("--samples", type=int, default=1000, help="of each row (default: %(default)s)")
    args = parser.parse_args(argv)
    rows = table(run(args))
    write_atomically(pathlib.Path(args.out) / "flow_tokens.md", markdown(rows).encode())
    print(measuring.columns(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
