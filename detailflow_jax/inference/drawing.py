"""Pictures of samples while a generator or FlowAR trains on codes or latents.

The tokenizer or autoencoder that made the codes or latents turns samples into images: the one that
`config.score.decoder` names, else that in their manifest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from detailflow_jax import data
from detailflow_jax.convert.fingerprint import encoder_fingerprint
from detailflow_jax.convert.load import load
from detailflow_jax.convert.published import Loaded
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.inference import programs
from detailflow_jax.inference.batching import in_batches
from detailflow_jax.inference.sampling import DECODERS, sampling_of
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import pictures, sharding
from detailflow_jax.runtime.errors import UserError
from detailflow_jax.tasks import TrainState

CLASSES, ROWS = 8, 4
_GUIDANCE = {"generator": 1.5, "flowar": 2.4}


def make_drawer(
    config: ConfigDict, mesh: Mesh, encoded_by: str, class_names: Sequence[str]
) -> "Drawer | None":
    """What draws samples of a run; None of a task that does not sample, or that draws by itself.

    Without a decoder there are no pictures, which the log says.

    Args:
      config: of the run.
      mesh: of the run.
      encoded_by: fingerprint of the encoder that made the codes or latents; "" if unknown.
      class_names: of the labels.
    """
    kind, _, folder = config.get("data", {}).get("source", "").partition(":")
    if config.get("task") not in DECODERS or kind not in ("codes", "latents"):
        return None
    if (config.get("vae") or {}).get("path"):  # FlowAR's task has it, and draws.
        return None
    source = data.CodeSource if kind == "codes" else data.LatentSource
    network, path = DECODERS[config.task], config.score.decoder
    path = path or source.read_manifest(folder).get("network", "")
    found, reason = _decoder(network, path, encoded_by)
    # Processes draw together or not at all.
    everywhere = sharding.in_all_processes(found is not None)
    if found is None or not everywhere:
        logging.warning(
            "no pictures of samples: %s; --config.score.decoder names the %s that makes images "
            "of them",
            reason or "another process has no decoder",
            NETWORKS[network].title,
        )
        return None
    return Drawer(config, mesh, found, class_names)


def _decoder(kind: str, path: str, encoded_by: str) -> tuple[Loaded | None, str]:
    """The network that decodes samples, or why there is none."""
    if not path:
        return None, "the data do not say what encoded them"
    try:
        found = load(kind, path)
    except UserError as error:
        return None, f"{path} cannot be read ({error})"
    if encoded_by and encoder_fingerprint(kind, found.params) != encoded_by:
        return None, f"{path} is not what encoded the data any more"
    return found, ""


class Drawer:
    """State -> {"samples": picture}; averaged weights where there are any.

    Sample i depends on i alone, so that pictures of different steps compare.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, decoder: Loaded, names: Sequence[str]):
        """Puts the decoder on every device."""
        self._mesh = mesh
        classes = min(CLASSES, config.model.num_classes, len(names) or CLASSES)
        self._captions = tuple(names[:classes]) or tuple(map(str, range(classes)))
        self._labels = np.tile(np.arange(classes, dtype=np.int32), ROWS)
        guidance = sampling_of(config, _GUIDANCE[config.task])
        # Jitted as a whole: the keys of all processes' samples are made on the devices.
        self._sample = jax.jit(guidance, static_argnames="seed")
        self._network: Any = NETWORKS[decoder.kind].module(decoder.config)
        parts = {part: x for part, x in decoder.params.items() if part != "encoder"}
        self._params = sharding.on_every_device(parts, mesh)

    def __call__(self, state: TrainState) -> Mapping[str, UInt8[np.ndarray, "_ _ 3"]]:
        """The picture of a state: four samples of each of up to eight classes, one per column.

        All processes of a run must call together. Takes no part in the state's randomness.
        """
        params = state.params if state.ema is None else state.ema

        def make(labels, indices):
            samples = self._sample(params, labels, seed=0, indices=indices)
            return programs.decode_whole(self._network, self._params, samples)

        count = len(self._labels)
        images = in_batches(
            make,
            count,
            self._labels,
            np.arange(count, dtype=np.int32),
            mesh=self._mesh,
            whole=True,
            finish=lambda x: np.asarray(pixels.to_uint8(x)),
        )
        columns = len(self._captions)
        return {"samples": pictures.grid(images, columns, column_captions=self._captions)}
