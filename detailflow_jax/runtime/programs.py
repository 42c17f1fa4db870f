"""The compiled steps of a run: made in threads, those that are needed soon ahead of their time.

A step that decodes images of another size is another program. Compiled when its step comes, it
would hold up the run; so it is compiled while the steps before it run.
"""

import atexit
import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from detailflow_jax.runtime import flops, memory, sharding
from detailflow_jax.runtime.distributed import COMPILER

LOOK = 2000
"""How many steps ahead programs are made for."""


class Program(NamedTuple):
    """One compiled step.

    Attributes:
      run: (state, batch, plan arrays) -> (state, metrics); takes the memory of the old state.
      flops: of the model in one step, on all devices together (`flops.written`).
    """

    run: Callable[..., Any]
    flops: int


class Programs(contextlib.AbstractContextManager):
    """The programs of a run by variant; a context manager that leaves unmade what it has not begun.

    Several threads compile on hosts with many cores. Every process of a run asks for the same
    programs in the same order.
    """

    def __init__(
        self,
        train_step: Callable,
        plan: Callable[[int], tuple[Hashable, Any]],
        mesh: jax.sharding.Mesh,
        config: ConfigDict,
        ahead: bool = True,
    ):
        """Takes a jitted step (`sharding.jit_step`) and the plan of each step.

        Args:
          train_step: (state, batch, plan arrays, *, variant) -> (state, metrics).
          plan: step -> (variant, plan arrays).
          mesh: in use while a step is traced.
          config: of the run: `total_steps`, and the fields that advice on memory names.
          ahead: whether batches of all steps have equal shapes, so that later programs can be made
            from what is known of the first.
        """
        self._step, self._plan, self._mesh = train_step, plan, mesh
        self._config, self._ahead = config, ahead
        self._made: dict[Hashable, Future[Program]] = {}
        self._lock = threading.Lock()  # of the two below
        self._waiting: collections.deque[tuple] = collections.deque()
        self._threads = 0

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._waiting.clear()

    def ask(self, step: int, planned: Any, state: Any, batch: Any) -> Future[Program]:
        """The program of a step with its plan, made now or soon; and later ones are begun.

        Its errors are those of the step's own code, and `memory.TooLarge`.
        """
        variant, arrays = planned
        if variant not in self._made:
            given = jax.tree.map(_described, (state, batch))
            self._begin(variant, arrays, given)
            last = min(step + LOOK, self._config.total_steps) if self._ahead else step
            for later in range(step + 1, last):
                self._begin(*self._plan(later), given)
        return self._made[variant]

    def _begin(self, variant: Hashable, arrays: Any, given: tuple[Any, Any]) -> None:
        if variant in self._made:
            return
        future = self._made[variant] = Future()
        with self._lock:
            self._waiting.append((future, variant, arrays, given))
            hire = self._threads < max(1, min(4, (os.cpu_count() or 1) // 16))
            self._threads += hire
        if hire:
            thread = threading.Thread(target=self._work, name=COMPILER, daemon=True)
            # The compiler cannot be interrupted, and the interpreter must not end beneath it.
            atexit.register(thread.join)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                future, *job = self._waiting.popleft()
            try:
                future.set_result(self._compile(*job))
            except BaseException as error:  # Whoever waits for the program raises it.
                future.set_exception(error)

    def _compile(self, variant: Hashable, arrays: Any, given: tuple[Any, Any]) -> Program:
        start = time.perf_counter()
        with sharding.use(self._mesh):
            traced = self._step.trace(*given, arrays, variant=variant)
            program = traced.lower().compile()
        needed = memory.check(program, self._config)
        seconds, name = time.perf_counter() - start, "" if variant is None else f" {variant}"
        logging.info("compiled the step%s in %.1f s%s", name, seconds, needed)
        return Program(program, flops.written(traced, model=True))


def _described(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type)
