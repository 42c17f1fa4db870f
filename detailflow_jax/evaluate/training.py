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
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.evaluate import generation, image_quality
from detailflow_jax.evaluate.distances import frechet_distance
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor, local_mesh
from detailflow_jax.evaluate.models import as_uint8, image_size
from detailflow_jax.evaluate.moments import Moments
from detailflow_jax.evaluate.networks import load_extractor
from detailflow_jax.evaluate.references import load_reference, open_images
from detailflow_jax.inference import programs
from detailflow_jax.inference.batching import in_batches, over_processes, whole_shares
from detailflow_jax.inference.sampling import DECODERS, sampling_of
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
    kind = GenerationScorer if config.task in DECODERS else ReconstructionScorer
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
        self.batch_size = whole_shares(min(s.batch_size, s.num_samples), mesh)
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
        """The images that `function` makes of rows, which it gets in batches over the mesh."""
        finish = functools.partial(as_uint8, what="images during training")
        return in_batches(
            function, self.batch_size, *rows, mesh=self.mesh, whole=True, finish=finish
        )

    def features(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of the same images in every process, each of which computes its share."""
        return over_processes(lambda first, own: self.extractor(own), images)


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
        self.network = programs.network_of(config)
        if self.extractor:
            self.reference = Moments.of([self.features(self.originals)["pool"]])

    def score(self, params: Any) -> tuple[Mapping[str, Any], int]:
        """Metrics of one set of parameters, and of how many images."""
        images = self.over_batches(
            functools.partial(programs.reconstruct, self.network, params), self.originals
        )
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
        # Jitted as a whole: the keys of all processes' samples are made on the devices.
        self.sample = jax.jit(sampling_of(config, s.cfg_scale), static_argnames="seed")
        self.decoder, self.decoder_params = self._load_decoder()
        self.reference = load_reference(
            s.reference,
            self.extractor,
            image_size=image_size(config.model, self.decoder.config),
            cache=pathlib.Path(workdir) / "references",
            data_dir=config.data.get("data_dir"),
        )

    def _load_decoder(self) -> tuple[Any, Any]:
        """The decoder's network, and its parameters on every device."""
        kind, path = DECODERS[self.config.task], self.config.score.decoder
        if not path:
            raise EvaluationError(
                f"config.score.decoder is empty: name the {kind} that makes images of samples, a "
                "workdir or a published checkpoint"
            )
        found = load.load(kind, path)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        params = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__),
            jax.tree.map(np.asarray, found.params),
        )
        return NETWORKS[kind].module(found.config), params

    def score(self, params: Any) -> tuple[Mapping[str, Any], int]:
        """Metrics of one set of parameters, and of how many images."""
        count = self.config.score.num_samples
        labels = generation.class_labels("balanced", count, self.config.model.num_classes, 0)

        def make(labels, indices):
            samples = self.sample(params, labels, seed=0, indices=indices)
            return programs.decode_whole(self.decoder, self.decoder_params, samples)

        images = self.over_batches(make, labels, np.arange(count, dtype=np.int32))
        features = self.features(images)
        values = generation.score(
            lambda name: [features[name]], self.reference, self.extractor.mesh
        )
        return values, count
