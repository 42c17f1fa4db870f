"""The toy task on a folder of images, read as in real runs; a configuration file and a program.

`python tests/helpers/toy_images.py --config tests/helpers/toy_images.py:FOLDER --workdir DIR`
"""

import os
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import toy_task
from detailflow_jax import train
from detailflow_jax.data import make_iterator
from detailflow_jax.runtime import distributed

SIDE = 8
PROGRAM = pathlib.Path(__file__)


def get_config(folder: str) -> ConfigDict:
    config = toy_task.get_config()
    config.data = ConfigDict({"source": f"folder:{folder}", "image_size": SIDE, "crop": "none"})
    config.data.update(num_workers=2, prefetch=1, worker_buffer=1)
    config.update(log_every=1, checkpoint_every=0)
    return config


def make_folder(folder: pathlib.Path, count: int = 40) -> list[pathlib.Path]:
    """Writes images of noise in eight classes; returns the files."""
    rng = np.random.default_rng(0)
    files = [folder / str(i % toy_task.CLASSES) / f"{i:03d}.png" for i in range(count)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
    return files


def put(link: pathlib.Path, target: str | pathlib.Path) -> None:
    """Puts a link in the place of a file, at once."""
    new = link.with_suffix(".new")
    new.symlink_to(target)
    os.replace(new, link)


class Rows:
    """The images as the inputs of the toy network."""

    def __init__(self, images, delay: float = 0.0):
        self._images, self._delay = images, delay

    def __next__(self):
        time.sleep(self._delay)
        batch = next(self._images)
        image = batch.pop("image").reshape(len(batch["label"]), -1)[:, : toy_task.WIDTH]
        return batch | {"x": image.astype(np.float32) / 255}

    def __getattr__(self, name):
        return getattr(self._images, name)


def rows(config: ConfigDict) -> Rows:
    images = make_iterator(config.data, batch_size=config.batch_size, seed=config.seed)
    return Rows(images, config.delay)


def run(config: ConfigDict, workdir: str):
    return train.train(config, workdir, toy_task.make_task(config), rows(config))


if __name__ == "__main__":
    distributed.leave(train.main(run=run))
