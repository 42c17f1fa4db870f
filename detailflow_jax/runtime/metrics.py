"""The output of a run: its log, its metrics, its progress.

    WORKDIR/log.txt          every message, with the parameter table and tracebacks
            metrics.jsonl    one JSON object per log step: "step", the means of the task's metrics
                             since the line before, "images_per_second", "seconds", and what
                             `Clock.report` tells under "perf/..."
            tensorboard/     the same scalars, and the figures
            figures/         the figures as NAME_STEP.png

On request, scalars and figures go to Weights & Biases too. Only process 0 writes.
"""

import contextlib
import datetime
import json
import logging as python_logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict
from tqdm import tqdm

from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import Diverged
from detailflow_jax.runtime.event_file import EventFile
from detailflow_jax.runtime.files import read_json_lines, write_atomically
from detailflow_jax.runtime.pictures import save_png
from detailflow_jax.runtime.wandb_run import WandbRun

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---------------------------------------------------------------------------------------- the log


class _Console(python_logging.Handler):
    """Messages on standard error, above a progress bar rather than through it."""

    def emit(self, record: python_logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def run_log(workdir: str | os.PathLike) -> Iterator[None]:
    """Within it, this package's messages go to the console and WORKDIR/log.txt.

    Of the messages of libraries, above all Orbax, only warnings are kept, and only in the file. The
    file also gets the traceback of an exception.
    """
    console = _Console(python_logging.INFO)
    console.addFilter(lambda record: record.pathname.startswith(_PACKAGE))
    handlers: list[python_logging.Handler] = [console]
    if jax.process_index() == 0:
        path = pathlib.Path(workdir) / "log.txt"
        file = python_logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        file.addFilter(
            lambda record: (
                record.pathname.startswith(_PACKAGE) or record.levelno >= python_logging.WARNING
            )
        )
        handlers.append(file)
    else:
        console.setLevel(python_logging.WARNING)
    logger = logging.get_absl_logger()
    before = logger.handlers[:], logger.propagate, logging.get_verbosity()
    logger.handlers[:], logger.propagate = handlers, False
    logging.set_verbosity(logging.DEBUG)
    try:
        yield
    except Exception:
        logging.debug("the run stopped here", exc_info=True)
        raise
    finally:
        logger.handlers[:], logger.propagate = before[:2]
        logging.set_verbosity(before[2])
        for handler in handlers:
            handler.close()


def log_start(config: ConfigDict, mesh: jax.sharding.Mesh, state: Any) -> None:
    """Logs the devices and the size of the model; the configuration and all arrays to the file.

    Args:
        config: of the run.
        mesh: its devices.
        state: with `params`, placed on the mesh.
    """
    logging.debug("configuration:\n%s", config)
    logging.info(
        "%d x %s in %d process(es), mesh %s",
        jax.device_count(),
        jax.devices()[0].device_kind,
        jax.process_count(),
        dict(mesh.shape),
    )
    overview = parameter_overview.get_parameter_overview(state.params, include_stats="sharding")
    logging.debug("parameters:\n%s", overview)
    logging.info("%s parameters", f"{parameter_overview.count_parameters(state.params):,}")
    if whole := sharding.left_whole(state):
        logging.warning(
            "config.mesh.fsdp=%d divides no width of %d arrays above 1 MiB: each device holds %.0f "
            "MiB of them whole, such as %s; another size of the axis would split them",
            mesh.shape["fsdp"],
            len(whole),
            sum(whole.values()) / 2**20,
            max(whole, key=whole.get),
        )


# ------------------------------------------------------------------------------------- the numbers


class Averages:
    """Means of the step metrics since the last log line; a host copy is made only when asked."""

    def __init__(self, totals: Mapping[str, list] | None = None):
        """`totals` of an earlier object continue it."""
        self.totals = dict(totals or {})  # {name: [sum, number of steps]}, JSON-like.
        self._on_device: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Adds the scalars of a step without waiting for them."""
        self._on_device.append((step, metrics))

    def fetch(self) -> None:
        """Waits for the steps added so far and brings `totals` up to date.

        Raises:
            Diverged: names the first step whose "loss" is NaN or Inf.
        """
        fetched, self._on_device = jax.device_get(self._on_device), []
        for step, metrics in fetched:
            if not np.isfinite(metrics["loss"]):
                raise Diverged(f"the loss is {float(metrics['loss'])} at step {step}")
            for name, value in metrics.items():
                total, count = self.totals.get(name, (0.0, 0))
                self.totals[name] = [total + float(value), count + 1]

    def take_means(self) -> dict[str, float]:
        """The means since the last call; a metric counts in the steps that reported it."""
        self.fetch()
        totals, self.totals = self.totals, {}
        return {name: total / count for name, (total, count) in totals.items()}


class MetricWriter(contextlib.AbstractContextManager):
    """Writes metrics and figures of process 0; a context manager that flushes on leaving."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool,
        wandb: Mapping[str, Any] | None = None,
        step: int = 0,
    ):
        """Opens the files of a run that has done `step` updates.

        The files may go further, where the run was killed after its last checkpoint: what they
        hold past `step` is dropped, for it will be written again.

        Args:
            tensorboard: write TensorBoard files too.
            wandb: project, name and config of `WandbRun`, where Weights & Biases gets all too.
        """
        self._workdir = pathlib.Path(workdir)
        self._primary = jax.process_index() == 0
        self._copies: list[EventFile | WandbRun] = []
        if self._primary:
            (self._workdir / "figures").mkdir(exist_ok=True)
            path = self._workdir / "metrics.jsonl"
            _keep_lines_until(path, step)
            self._lines = path.open("a")
            if tensorboard:
                self._copies.append(EventFile(self._workdir / "tensorboard", step))
            if wandb:
                self._copies.append(WandbRun(self._workdir, **wandb))

    def __exit__(self, kind, *exception) -> None:
        if self._primary:
            self._lines.close()
        for copy in self._copies:
            copy.close(failed=kind is not None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl (null for what is not finite), and the same elsewhere."""
        if not self._primary:
            return
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **line}) + "\n")
        self._lines.flush()
        for copy in self._copies:
            copy.scalars(step, values)

    def figures(self, step: int, figures: Mapping[str, np.ndarray]) -> None:
        """figures/NAME_STEP.png, and the same elsewhere, from {NAME: uint8 [H, W, 3]}."""
        if not self._primary:
            return
        for name, picture in figures.items():
            save_png(self._workdir / "figures" / f"{name}_{step:06d}.png", picture)
        for copy in self._copies:
            copy.images(step, figures)


def _keep_lines_until(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_json_lines(path) if line.get("step", 0) <= step]
    write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


# ------------------------------------------------------------------------------------ the progress


class Progress(contextlib.AbstractContextManager):
    """Images per second and the time left: a bar on a terminal, else a message per log step."""

    def __init__(self, total_steps: int, step: int, batch_size: int, seconds: float):
        """Starts at `step`, with `seconds` spent by earlier parts of the run."""
        self._total_steps, self._batch_size = total_steps, batch_size
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=jax.process_index() != 0 or not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._started = time.perf_counter() - seconds
        self.restart(step)

    def __exit__(self, *exception) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, all its parts together."""
        return time.perf_counter() - self._started

    def restart(self, step: int) -> None:
        """Starts the next rate here, without what came before, such as compilation."""
        self._step, self._since, self._paused = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The time of the block does not lower the images per second."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def report(self, step: int, loss: float, more: str = "") -> dict[str, float]:
        """Shows the progress after `step`; returns the rate and the time for the log line.

        `more` stands at the end of the message of the log.
        """
        elapsed = time.perf_counter() - self._since - self._paused
        steps = step - self._step
        seconds_a_step = elapsed / max(steps, 1)
        # The first step has no time of its own, beside that of compilation.
        rate = self._batch_size / max(seconds_a_step, 1e-9) if steps else math.nan
        left = datetime.timedelta(seconds=int((self._total_steps - step) * seconds_a_step))
        speed = f"{rate:.0f} images/s, {left} left" if steps else "no step timed yet"
        self._bar.set_postfix_str(f"loss {loss:.4g}, {speed}", False)
        self._bar.update(step - self._bar.n)
        logging.log(
            logging.INFO if self._bar.disable else logging.DEBUG,
            "step %d/%d  loss %.5g  %s  %s",
            step,
            self._total_steps,
            loss,
            speed.replace(", ", "  "),
            more,
        )
        self.restart(step)
        return {"images_per_second": rate, "seconds": self.seconds}
