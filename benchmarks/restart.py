"""From a restart to its first step: without kept programs, and with them.

    python benchmarks/restart.py --out runs/restart
    python benchmarks/restart.py --out runs/restart --bucket gs://BUCKET/PATH    # or --serve

A run of one step makes a checkpoint and fills a folder of compiled programs. Then it is started
again, each time for one step more: with an empty folder, and with that one. With a bucket the empty
folder is there, and a third start finds what the one before it kept. Seconds are from the start of
the process to the end of the first step, and of its parts, as the run itself tells them.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import buckets


def start(config: str, workdir: pathlib.Path, compiled: str, steps: int) -> dict:
    """Trains until `steps`; {"first step", "compile", "restore", "start"}: seconds."""
    overrides = {"total_steps": steps, "log_every": 1, "figures_every": 0, "score.every": 0}
    command = [sys.executable, "-m", "detailflow_jax.train", "--config", config]
    command += ["--workdir", str(workdir)]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    began = time.time()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled}
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
    buckets.add_arguments(parser, "keep compiled programs")
    args = parser.parse_args(argv)
    workdir, kept = args.out / "run", str(args.out / "kept")
    cold = 0.0
    with buckets.opened(args) as bucket:
        before = start(args.config, workdir, kept, 1)
        folders = {"cold": bucket or str(args.out / "empty"), "kept on disk": kept}
        folders |= {"kept in the bucket": bucket} if bucket else {}
        for steps, (name, folder) in enumerate(folders.items(), start=2):
            now = start(args.config, workdir, folder, steps)
            # The account of a run goes over all its parts.
            row = {k: v - before[k] if k != "first step" else v for k, v in now.items()}
            print(f"{name}:", ", ".join(f"{key} {value:.1f} s" for key, value in row.items()))
            cold, before = cold or row["first step"], now
            print(f"  {cold / row['first step']:.2f} times as fast as cold", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
