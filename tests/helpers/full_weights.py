"""Full-size published models with weights by rule, so that only outputs need recording.

For a name and shape: rng = Generator(PCG64([crc32(name), seed])), w = rng.standard_normal(shape) as
float32, then rank >= 2: times 0.5 if shape[0] == 1 else 1/sqrt(prod(shape[1:])); `running_var`:
1 + 0.1*|w|; `bias` and `running_mean`: 0.02*w; otherwise 1 + 0.02*w.
"""

import json
import math
import zlib

import numpy as np

import golden_files


def tensor(name, shape, seed):
    """The weights that the rule gives a name."""
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    w = rng.standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return w * np.float32(0.5 if shape[0] == 1 else 1 / math.sqrt(math.prod(shape[1:])))
    if name.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(w)
    if name.endswith(("bias", "running_mean")):
        return np.float32(0.02) * w
    return 1 + np.float32(0.02) * w


def shapes(name):
    """Published name -> shape, of a model that `golden/NAME.json` lists."""
    keys = json.loads((golden_files.FOLDER / f"{name}.json").read_text())["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def state_dict(name, not_filled=(), adjust=lambda key, w: w):
    """A full-size state dict; buffers in `not_filled` (names or ends of names) are zero.

    `adjust` is what the json's "rule" adds to the one above: (published name, tensor) -> tensor.
    """
    seed = json.loads((golden_files.FOLDER / f"{name}.json").read_text())["seed"]
    return {
        key: np.zeros(shape, np.float32)
        if key.endswith(tuple(not_filled))
        else adjust(key, tensor(key, shape, seed))
        for key, shape in shapes(name).items()
    }
