"""What the clock of a run costs: step times with it against without it, in one process.

    python benchmarks/telemetry.py --config configs/tokenizer.py:digits --steps 20 --rounds 10

One compiled train step runs in blocks of `--steps`, in turn as the training loop calls it and
without the clock. A block ends when its last step has ended. The ratio is that of the medians of
the blocks, beside the smallest and largest ratio of neighbouring blocks.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import jax

from detailflow_jax.data import make_iterator
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.clock import Clock
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.feed import Feed
from detailflow_jax.tasks import make_task


def measure(spec: str, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per step, one of each block: (with the clock, without it)."""
    config = load_config(spec)
    task, mesh = make_task(config), sharding.make_mesh(config.mesh)
    iterator = make_iterator(config.data, batch_size=config.batch_size, seed=config.seed)
    with sharding.use(mesh), Feed(iterator, mesh) as feed, Clock() as clock:
        state = sharding.create_sharded(task.init, jax.random.key(config.seed), mesh)
        variant, plan = task.plan(0)
        batch = feed.take()
        step = sharding.jit_step(task.train_step, state)
        program = step.lower(state, batch, plan, variant=variant).compile()
        state, _ = program(state, batch, plan)

        def block(watched: bool) -> float:
            nonlocal state
            jax.block_until_ready(state)
            start = time.perf_counter()
            for i in range(steps):
                if not watched:
                    state, metrics = program(state, batch, plan)
                    continue
                with clock.doing("input"):
                    pass
                with clock.dispatch(i):
                    state, metrics = program(state, batch, plan)
                clock.watch(metrics["loss"], 1)
                with clock.doing("input"):
                    pass
            if watched:
                clock.report()  # As at a log line.
            jax.block_until_ready(state)
            return (time.perf_counter() - start) / steps

        block(True), block(False)
        both = [(block(True), block(False)) for _ in range(rounds)]
    return [a for a, _ in both], [b for _, b in both]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/tokenizer.py:digits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    watched, bare = measure(args.config, args.steps, args.rounds)
    ratios = [a / b for a, b in zip(watched, bare, strict=True)]
    a, b = statistics.median(watched), statistics.median(bare)
    print(f"with the clock {a * 1e3:.2f} ms a step, without {b * 1e3:.2f} ms, ratio {a / b:.4f}")
    print(f"ratios of neighbours {min(ratios):.3f} to {max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
