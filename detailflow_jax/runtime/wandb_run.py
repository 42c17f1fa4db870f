"""A run on Weights & Biases, of the package `wandb` (the extra `wandb`)."""

import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from detailflow_jax.runtime import extras
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.files import write_atomically

FILE = "wandb_id"
_FINISH = 30.0  # Seconds for the last uploads: a pod that is taken away gives no more.


class WandbRun:
    """Writes scalars and images to a run that a restart continues.

    What a killed run had written after its last checkpoint stays, and is not written again: the
    service takes a step once. If it fails, training goes on without it.
    """

    def __init__(self, folder: pathlib.Path, project: str, name: str, config: Mapping[str, Any]):
        """Starts or continues the run whose id is in FOLDER/wandb_id.

        Args:
          folder: gets the id, and a folder `wandb` with the local files.
          project: made if it is missing. The service's own variables, such as WANDB_MODE=offline
            and WANDB_ENTITY, say the rest.
          name: of the run.
          config: of the run.

        Raises:
          MissingExtra: the package is not installed.
          ConfigError: nobody is logged in, or the service refuses the project.
        """
        self._wandb = extras.require("wandb")
        if not (path := folder / FILE).exists():
            write_atomically(path, secrets.token_hex(4).encode())
        self._run: Any = None
        try:
            self._run = self._wandb.init(
                project=project,
                name=name,
                id=path.read_text(),
                resume="allow",
                dir=str(folder),
                config=dict(config),
                allow_val_change=True,  # Some fields may differ in a resumed run.
                settings=self._wandb.Settings(
                    console="off", silent=True, finish_timeout=_FINISH, save_code=False
                ),
            )
        except (self._wandb.errors.UsageError, self._wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"config.wandb.project={project!r}: {error}; run `wandb login`, set "
                "WANDB_MODE=offline, or leave the project empty"
            ) from error
        except Exception as error:
            self._give_up(error)
        else:
            logging.info("Weights & Biases: %s", self._run.url or f"offline, in {self._run.dir}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one point for each name."""
        self._try(lambda run: run.log(dict(values), step=step))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes one picture uint8 [H, W, 3] for each name."""
        pictures = {name: self._wandb.Image(image) for name, image in images.items()}
        self._try(lambda run: run.log(pictures, step=step))

    def close(self, failed: bool = False) -> None:
        """Uploads the rest and ends the run, as failed where it did."""
        self._try(lambda run: run.finish(exit_code=int(failed)))

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # Its own service may be gone; the classes are many.
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logging.error("Weights & Biases fails, training goes on without it: %s", error)
        self._run = None
