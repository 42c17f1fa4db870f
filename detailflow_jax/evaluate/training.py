"""A small-sample score during training, of the raw and of the averaged weights.

`config.score` says when and against what. A tokenizer or autoencoder reconstructs the first images
of the reference; a generator or FlowAR makes samples, which the decoder at `config.score.decoder`
turns into images. It all runs over the mesh of the run, with the parameters where they are; only
the feature network is copied to every device. Sample i depends on i alone, so scores of different
steps and runs compare.

FID of a few images is far above that of many: each score bears its number of images in its name.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from detailflow_jax.convert import load
from detailflow_jax.evaluate import generation, image_quality
from detailflow_jax.evaluate.distances import frechet_distance
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor, local_mesh, split_count
from detailflow_jax.evaluate.models import as_uint8
from detailflow_jax.evaluate.moments import Moments
from detailflow_jax.evaluate.networks import load_extractor
from detailflow_jax.evaluate.references import load_reference, open_images
from detailflow_jax.inference import programs as inference
from detailflow_jax.models.sampler import sample_keys
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import TrainState

Scores = dict[str, float]


def make_scorer(config: ConfigDict, mesh: Mesh, workdir: str) -> "Scorer | None":
    """The scorer of a run, None where `config.score.every` is 0.

    Raises:
      ConfigError: fields that are missing or do not go together, images that cannot be read.
      WeightsError: Inception is not there; the text says where people get it.
    """
    if not config.score.every:
        return None
    if not config.score.reference:
        raise ConfigError(
            "config.score.reference is empty: name what to score against (an .npz, a folder of "
            "pictures, tfds:NAME:SPLIT, digits:test), or set config.score.every=0"
        )
    kind = GenerationScorer if config.task in inference.DECODERS else ReconstructionScorer
    try:
        with sharding.use(local_mesh()):
            return kind(config, mesh, workdir)
    except (EvaluationError, FileNotFoundError) as error:
        raise ConfigError(f"config.score: {error}") from error


class Scorer:
    """State -> {"score/raw/NAME_of_N": value, "score/ema/NAME_of_N": value}."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.config, self.mesh, s = config, mesh, config.score
        self.local = local_mesh()  # of this process, for what each computes by itself
        parts = split_count(mesh)
        self.batch_size = -(-min(s.batch_size, s.num_samples) // parts) * parts
        self.extractor: FeatureExtractor | None = None
        if s.features:
            self.extractor = load_extractor(
                s.inception,
                s.batch_size,
                field="config.score.inception",
                without=self.WITHOUT,
            )

    def __call__(self, state: TrainState) -> Scores:
        """Scores the parameters of a state, and their average where there is one.

        All processes of a run must call together. Takes no part in the state's randomness.

        Raises:
          EvaluationError: the network gives NaN or infinity.
        """
        found, kinds = {}, {"raw": state.params, "ema": state.ema}
        for kind, params in kinds.items():
            if params is not None:
                with sharding.use(self.local):
                    values, count = self.score(params)
                found |= {
                    f"score/{kind}/{name}_of_{count}": float(value)
                    for name, value in values.items()
                    if value is not None
                }
        return found

    def over_batches(self, function: Callable, *rows: np.ndarray) -> np.ndarray:
        """`function` of equal batches of rows that lie over the mesh: float images as uint8."""
        count, size = len(rows[0]), self.batch_size
        padded = [np.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1), "edge") for x in rows]
        place = NamedSharding(self.mesh, PartitionSpec(sharding.BATCH))
        parts = []
        for start in range(0, count, size):
            batch = [
                jax.make_array_from_callback(x.shape, place, x.__getitem__)
                for x in (x[start : start + size] for x in padded)
            ]
            with sharding.use(self.mesh):
                images = sharding.to_host(function(*batch))
            parts.append(as_uint8(images, f"images from {start} on"))
        return np.concatenate(parts)[:count]

    def features(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of the same images in every process, each of which computes its share."""
        processes, index = jax.process_count(), jax.process_index()
        share = -(-len(images) // processes)
        padded = np.pad(images, [(0, share * processes - len(images)), *[(0, 0)] * 3], "edge")
        own = self.extractor(padded[index * share : (index + 1) * share])
        return {name: sharding.gather_processes(x)[: len(images)] for name, x in own.items()}


class ReconstructionScorer(Scorer):
    """PSNR and SSIM of reconstructions of the reference's first images, and their rFID."""

    WITHOUT = "config.score.features=False, which leaves PSNR and SSIM"

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: str):
        super().__init__(config, mesh)
        side = config.model.get("image_size", config.data.image_size)
        images = open_images(config.score.reference, side, config.data.get("data_dir"))
        count = min(config.score.num_samples, len(images))
        if count < 2:
            raise EvaluationError(f"{images.name} holds {count} images, expected 2 at least")
        self.originals = images.read(0, count)
        self.run = jax.jit(inference.reconstruction(config))
        if self.extractor:
            self.reference = Moments.of([self.features(self.originals)["pool"]])

    def score(self, params: Any) -> tuple[Mapping[str, Any], int]:
        """Metrics of one set of parameters, and of how many images."""
        images = self.over_batches(functools.partial(self.run, params), self.originals)
        values = {
            "psnr": np.mean(image_quality.psnr(images, self.originals)),
            "ssim": np.mean(image_quality.ssim(images, self.originals)),
        }
        if self.extractor:
            made = Moments.of([self.features(images)["pool"]])
            values["rfid"] = frechet_distance(
                self.reference.mean, self.reference.covariance, made.mean, made.covariance
            )
        return values, len(images)


class GenerationScorer(Scorer):
    """FID and its kin of samples, of every class as many."""

    WITHOUT = "config.score.every=0"

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: str):
        s = config.score
        if not s.features:
            raise EvaluationError("config.score.features=False leaves no score for samples")
        super().__init__(config, mesh)
        self.sampling = inference.sampling(config, s.cfg_scale)
        decoder = self._load_decoder()
        self.decode = jax.jit(inference.decoding(decoder))
        self.sample = jax.jit(self._sample)
        side = getattr(decoder, "image_size", None)
        self.reference = load_reference(
            s.reference,
            self.extractor,
            image_size=side or config.model.scales[-1] * decoder.stride,
            cache=pathlib.Path(workdir) / "references",
            data_dir=config.data.get("data_dir"),
        )

    def _load_decoder(self) -> Any:
        """The decoder's configuration; its parameters are kept on every device."""
        kind, path = inference.DECODERS[self.config.task], self.config.score.decoder
        if not path:
            raise EvaluationError(
                f"config.score.decoder is empty: name the {kind} that makes images of samples, a "
                "workdir or a published checkpoint"
            )
        found = load.load(kind, path)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.decoder = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__),
            jax.tree.map(np.asarray, found.params),
        )
        return found.config

    def _sample(self, params: Any, labels: jax.Array, indices: jax.Array) -> jax.Array:
        keys = sample_keys(0, indices)
        return self.sampling.run(params, labels, keys, self.sampling.guidance)

    def score(self, params: Any) -> tuple[Mapping[str, Any], int]:
        """Metrics of one set of parameters, and of how many images."""
        count = self.config.score.num_samples
        labels = generation.class_labels("balanced", count, self.config.model.num_classes, 0)
        images = self.over_batches(
            lambda *rows: self.decode(self.decoder, self.sample(params, *rows)),
            labels,
            np.arange(count, dtype=np.int32),
        )
        features = self.features(images)
        values = generation.score(
            lambda name: [features[name]], self.reference, self.extractor.mesh
        )
        return values, count
