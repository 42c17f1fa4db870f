"""From a restart to its first step: without kept programs, and with them.

    python benchmarks/restart.py --config configs/tokenizer.py:digits --out runs/restart

A run of one step makes a checkpoint and fills a folder of compiled programs. Then it is started
again, each time for one step more: with an empty folder, and with that one. Seconds are from the
start of the process to the end of the first step, and of its parts, as the run itself tells them.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence


def start(config: str, workdir: pathlib.Path, compiled: pathlib.Path, steps: int) -> dict:
    """Trains until `steps`; {"first step", "compile", "restore", "start"}: seconds."""
    overrides = {"total_steps": steps, "log_every": 1, "figures_every": 0, "score.every": 0}
    command = [sys.executable, "-m", "detailflow_jax.train", "--config", config]
    command += ["--workdir", str(workdir)]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    began = time.time()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    log = (workdir / "log.txt").read_text().splitlines()
    line = next(line for line in reversed(log) if "first step done after" in line)
    stamp, milliseconds = line[:19], int(line[20:23])
    ended = time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) + milliseconds / 1000
    account = json.loads((workdir / "clock.json").read_text())["seconds"]
    parts = {name: account.get(name, 0.0) for name in ("compile", "restore", "start")}
    return {"first step": ended - began} | parts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/tokenizer.py:digits")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    workdir, kept = args.out / "run", args.out / "kept"
    before = start(args.config, workdir, kept, 1)
    rows = {}
    for steps, (name, folder) in enumerate({"cold": "empty", "kept": "kept"}.items(), start=2):
        now = start(args.config, workdir, args.out / folder, steps)
        # The account of a run goes over all its parts.
        rows[name] = {k: v - before[k] if k != "first step" else v for k, v in now.items()}
        before = now
    for name, row in rows.items():
        print(name, ", ".join(f"{key} {value:.1f} s" for key, value in row.items()), flush=True)
    print(f"ratio {rows['cold']['first step'] / rows['kept']['first step']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
