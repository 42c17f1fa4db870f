"""A small-sample score during training, of the raw and of the averaged weights.

`config.score` says when and against what. A tokenizer or autoencoder reconstructs the first images
of the reference; a generator or FlowAR makes samples, which the decoder at `config.score.decoder`
turns into images. It all runs over the mesh of the run, with the parameters where they are; only
the feature network is copied to every device. Sample i depends on i alone, so scores of different
steps and runs compare.

FID of a few images is far above that of many: each score has its number of images in its name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from detailflow_jax.convert import load
from detailflow_jax.convert.fingerprint import encoder_fingerprint
from detailflow_jax.convert.published import Loaded
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.evaluate import generation, image_quality
from detailflow_jax.evaluate.distances import NEIGHBOUR, frechet_distance, gaussian
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor, encoder, local_mesh
from detailflow_jax.evaluate.models import image_size, images_of
from detailflow_jax.evaluate.networks import FEATURES, load_extractor, pixel_extractor
from detailflow_jax.evaluate.references import load_reference, open_images
from detailflow_jax.inference import programs
from detailflow_jax.inference.batching import over_processes, whole_shares
from detailflow_jax.inference.sampling import DECODERS, sampling_of
from detailflow_jax.runtime import files, sharding
from detailflow_jax.runtime.errors import ConfigError, NotFoundError, unknown_name
from detailflow_jax.tasks import TrainState

Measure = Callable[[Any], tuple[Mapping[str, Any], int]]
"""Parameters -> metrics by name, and of how many images."""


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
    try:
        with sharding.use(local_mesh()):
            return Scorer(config, mesh, workdir)
    except (EvaluationError, NotFoundError) as error:
        raise ConfigError(f"config.score: {error}") from error


class Scorer:
    """State -> {"score/raw/NAME_of_N": value, "score/ema/NAME_of_N": value}."""

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: str):
        self.config, self.mesh, s = config, mesh, config.score
        self.local = local_mesh()  # of this process, for what each computes by itself
        self.batch_size = whole_shares(min(s.batch_size, s.num_samples or s.batch_size), mesh)
        samples = config.task in DECODERS
        if samples and not s.features:
            raise EvaluationError("config.score.features=False leaves no score for samples")
        decoder = self._load_decoder() if samples else None
        self.extractor = self._load_extractor(decoder) if s.features else None
        self.measure = self._generation(workdir, decoder) if decoder else self._reconstruction()

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Scores the parameters of a state, and their average where there is one.

        All processes of a run must call together. Takes no part in the state's randomness.

        Raises:
          EvaluationError: the network gives NaN or infinity.
        """
        found = {}
        for kind, params in {"raw": state.params, "ema": state.ema}.items():
            if params is not None:
                with sharding.use(self.local):
                    values, count = self.measure(params)
                found |= {
                    f"score/{kind}/{name}_of_{count}": float(value)
                    for name, value in values.items()
                    if value is not None
                }
        return found

    def _reconstruction(self) -> Measure:
        """PSNR and SSIM of reconstructions of the reference's first images, and their rFID."""
        config = self.config
        side = config.model.get("image_size", config.data.image_size)
        images = open_images(config.score.reference, side, config.data.get("data_dir"))
        originals = images.read(0, min(config.score.num_samples or len(images), len(images)))
        count, network = len(originals), programs.network_of(config)
        if count < 2:
            raise EvaluationError(f"{images.name} holds {count} images, expected 2 at least")
        reference = gaussian([self._features(originals)["pool"]]) if self.extractor else None

        def measure(params: Any) -> tuple[Mapping[str, Any], int]:
            made = self._images(functools.partial(programs.reconstruct, network, params), originals)
            values = {
                "psnr": np.mean(image_quality.psnr(made, originals)),
                "ssim": np.mean(image_quality.ssim(made, originals)),
            }
            if reference:
                features = self._features(made)["pool"]
                name = f"rfd_{self.extractor.name}" if self.extractor.name else "rfid"
                values[name] = frechet_distance(*reference, *gaussian([features]))
            return values, count

        return measure

    def _load_extractor(self, decoder: Loaded | None) -> FeatureExtractor:
        """The extractor that `config.score.network` names."""
        s = self.config.score
        name = s.get("network", "inception")
        if name == "pixels":
            if decoder:
                side = image_size(self.config.model, decoder.config)
            else:
                side = self.config.model.get("image_size", self.config.data.image_size)
            images = open_images(s.reference, side, self.config.data.get("data_dir"))
            return pixel_extractor(images, s.batch_size)
        if name == "encoder" and decoder:
            network = NETWORKS[decoder.kind].module(decoder.config)
            fingerprint = encoder_fingerprint(decoder.kind, decoder.params)
            made = encoder(decoder.kind, network, decoder.params, fingerprint)
            return FeatureExtractor(made, batch_size=s.batch_size)
        if name != "inception":
            known = FEATURES if decoder else [x for x in FEATURES if x != "encoder"]
            raise unknown_name("config.score.network", name, known)
        rest = "config.score.features=False, which leaves PSNR and SSIM"
        without = f"config.score.network=pixels, or {rest if not decoder else 'every=0'}"
        return load_extractor(
            s.inception, s.batch_size, field="config.score.inception", without=without
        )

    def _generation(self, workdir: str, found: Loaded) -> Measure:
        """FID and its kin of samples, equally many of every class."""
        config, s = self.config, self.config.score
        # Jitted as a whole: the keys of all processes' samples are made on the devices.
        sample = jax.jit(sampling_of(config, s.cfg_scale), static_argnames="seed")
        decoder = NETWORKS[found.kind].module(found.config)
        decoder_params = sharding.on_every_device(found.params, self.mesh)
        reference = load_reference(
            s.reference,
            self.extractor,
            image_size=image_size(config.model, decoder.config),
            cache=files.path(workdir) / "references",
            data_dir=config.data.get("data_dir"),
        )
        count = s.num_samples or reference.count
        if count <= NEIGHBOUR:
            raise EvaluationError(
                f"config.score.num_samples={s.num_samples} with {reference.count} images in "
                f"{reference.name}: expected more than {NEIGHBOUR} samples"
            )
        labels = generation.class_labels("balanced", count, config.model.num_classes, 0)

        def measure(params: Any) -> tuple[Mapping[str, Any], int]:
            def make(labels, indices):
                samples = sample(params, labels, seed=0, indices=indices)
                return programs.decode_whole(decoder, decoder_params, samples)

            indices = np.arange(len(labels), dtype=np.int32)
            features = self._features(self._images(make, labels, indices))
            parts = lambda name: [features[name]]  # noqa: E731
            found = generation.score(parts, reference, self.extractor.mesh, self.extractor.name)
            return found, len(labels)

        return measure

    def _load_decoder(self) -> Loaded:
        """The tokenizer or VAE that makes images of samples."""
        kind, path = DECODERS[self.config.task], self.config.score.decoder
        if not path:
            raise EvaluationError(
                f"config.score.decoder is empty: name the {kind} that makes images of samples, a "
                "workdir or a published checkpoint"
            )
        return load.load(kind, path)

    def _images(self, function: Callable, *rows: np.ndarray) -> np.ndarray:
        """The images that `function` makes of rows, which it gets in batches over the mesh."""
        what = "images during training"
        return images_of(function, self.batch_size, *rows, mesh=self.mesh, what=what)

    def _features(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of the same images in every process, each of which computes its share."""
        return over_processes(lambda first, own: self.extractor(own), images)
