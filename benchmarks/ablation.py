"""The directions of the papers' ablations, on scikit-learn's handwritten digits.

    python benchmarks/ablation.py --seeds 3 --out runs/ablation
    python benchmarks/ablation.py --system flowar --seeds 3 --out runs/ablation_flowar

Every arm trains anew for every seed, all for equally many steps on equally many images. Each arm
of DetailFlow adds one thing to the arm above, in the paper's order; each arm of FlowAR changes one
thing of the whole system. What is measured:

    classifier   share of the sampled digits that a classifier of real ones assigns to their label
    distance     Fréchet distance of sampled and real digits (training and held out) in the
                 classifier's features
    PSNR         of held-out digits, reconstructed from all tokens (DetailFlow)
    steps        of the generator for one image (DetailFlow)
    paper        the FID of the paper's table on ImageNet, for the direction (FlowAR)

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

import ablation_detailflow
import ablation_flowar
import measuring
from tqdm import tqdm

from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.train import Preempted

SYSTEMS = {"detailflow": ablation_detailflow, "flowar": ablation_flowar}
"""Modules with ARMS, COLUMNS, Settings, `run` and `describe`."""

Figures = Mapping[str, float]


def run(system: Any, arm: Any, seed: int, settings: Any, out: pathlib.Path) -> Figures:
    """The figures of one arm with one seed, which OUT/result.json holds once they are there.

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
    figures = system.run(arm, seed, settings, out)
    content = {"settings": definition, "figures": figures}
    write_atomically(path, json.dumps(content, indent=2).encode())
    return figures


# --------------------------------------------------------------------------------------- the table


def summary(
    system: Any, results: Mapping[int, Mapping[str, Figures]]
) -> dict[str, dict[str, tuple]]:
    """{seed: {arm: figures}} -> {arm: {figure: (mean, standard deviation)}}."""
    return {
        arm.name: {
            figure: spread([found[arm.name][figure] for found in results.values()])
            for figure in system.COLUMNS
        }
        for arm in system.ARMS
    }


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value does not have."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def table(system: Any, found: Mapping[str, Mapping[str, tuple]]) -> list[tuple[str, ...]]:
    """The rows of the table, the first one its heading."""
    rows = [("", *(heading for heading, _ in system.COLUMNS.values()))]
    for arm in system.ARMS:
        cells = []
        for figure, (_, form) in system.COLUMNS.items():
            mean, deviation = found[arm.name][figure]
            cell = form.format(mean)
            if deviation:  # None of one seed, 0 of what does not depend on it
                cell += f" ± {form.format(deviation)}"
            cells.append(cell)
        rows.append((arm.title, *cells))
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "-|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def write_table(
    system: Any, out: pathlib.Path, settings: Any, results: Mapping[int, Mapping[str, Figures]]
) -> str:
    """Writes ablation.json and ablation.md; returns the table as text."""
    found = summary(system, results)
    rows = table(system, found)
    about = (
        f"{system.describe(settings)}, seeds {', '.join(map(str, results))}; "
        "mean ± standard deviation over the seeds"
    )
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
    add("--system", default="detailflow", choices=SYSTEMS, help="default: %(default)s")
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
    system, out = SYSTEMS[args.system], pathlib.Path(args.out)
    settings = system.Settings().scaled(args.scale)
    results: dict[int, dict[str, Figures]] = {}
    try:
        with tqdm(total=args.seeds * len(system.ARMS), unit="run") as progress:
            for seed in range(args.seeds):
                found = {}
                for arm in system.ARMS:
                    progress.set_description(f"seed {seed}, {arm.name}")
                    folder = out / f"seed{seed}" / arm.name
                    found[arm.name] = run(system, arm, seed, settings, folder)
                    progress.update()
                results[seed] = found
                text = write_table(system, out, settings, results)
    except (ConfigError, Preempted) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}\n\ntable: {out / 'ablation.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
