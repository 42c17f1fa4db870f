"""Step time while checkpoints are saved in the background, against none saved: a ratio of one run.

    python benchmarks/saving.py                       # to a folder of this machine
    python benchmarks/saving.py --bucket gs://BUCKET/PATH
    python benchmarks/saving.py --serve               # a bucket server on this machine (extra test)

The rounds alternate, so that what else the machine does falls on both.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import buckets
import jax
import jax.numpy as jnp

from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.tasks import TrainState


@functools.partial(jax.jit, static_argnames="repeats", donate_argnums=0)
def train_step(state: TrainState, repeats: int) -> TrainState:
    """Stands for a step: `repeats` products of a weight with a batch, and an update of all."""
    x = jnp.ones((256, len(state.params["w"][0])))
    for _ in range(repeats):
        x = jnp.tanh(x @ state.params["w"][0])
    params = {"w": [w + 1e-6 * x.mean() for w in state.params["w"]]}
    return state.replace(step=state.step + 1, params=params)


def measure(
    state: TrainState, checkpoints: Checkpoints, args: argparse.Namespace
) -> dict[bool, list[tuple[float, float]]]:
    """Seconds of a step, and of it waiting in `save`, per round: {whether it saves: [...]}."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for round_ in range(2 * args.rounds + 2):
        saves = round_ % 2 == 1
        start, waited = time.perf_counter(), 0.0
        for step in range(args.every):
            state = train_step(state, args.repeats)
            if saves and step == 0:  # It has the rest of the round to be written.
                jax.block_until_ready(state)
                before = time.perf_counter()
                checkpoints.save(int(state.step), state, {}, {})
                waited += time.perf_counter() - before
        jax.block_until_ready(state)
        if round_ > 1:  # The first two compile.
            found[saves].append(((time.perf_counter() - start) / args.every, waited))
        checkpoints.latest()  # Waits for the save, outside of the measured time.
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add: Callable = parser.add_argument
    buckets.add_arguments(parser, "save")
    add("--megabytes", type=int, default=64, help="size of the state")
    add("--repeats", type=int, default=20, help="products in a step: how long it takes")
    add("--every", type=int, default=40, help="steps in a round, with one save or none")
    add("--rounds", type=int, default=3, help="rounds of each kind")
    args = parser.parse_args(argv)
    weights = [jnp.full((1024, 1024), 1e-3) for _ in range(max(1, args.megabytes // 4))]
    state = TrainState(step=jnp.int32(0), params={"w": weights}, opt_state={})
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(buckets.opened(args))
        workdir = workdir or stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints = stack.enter_context(Checkpoints(workdir, 1))
        found = measure(state, checkpoints, args)
    steps = {saves: statistics.median(x for x, _ in rows) for saves, rows in found.items()}
    waits = statistics.median(x for _, x in found[True])
    print(f"step, {args.megabytes} MB of state, a save every {args.every} steps, or none:")
    print(f"  {steps[True]:.4f} s and {steps[False]:.4f} s, ratio {steps[True] / steps[False]:.3f}")
    print(f"  the loop waits {waits:.3f} s for a save: copies and checksums")


if __name__ == "__main__":
    main()
