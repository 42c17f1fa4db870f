"""Where images come from a model: the one place that knows the kinds of models.

A generator draws codes that a tokenizer decodes, FlowAR draws latents that a VAE decodes; a
tokenizer or VAE by itself encodes and decodes. Models are what `inference.api` loads.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import split_count
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.inference.programs import DECODERS
from detailflow_jax.ops import correction
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import sharding


@dataclasses.dataclass
class Sampler:
    """A generating model with its decoder: labels -> images, spread over a mesh.

    Sample i depends on the seed and on i alone. `options` go to the model's `sample`.
    """

    model: Any
    decoder: Any
    mesh: Mesh
    batch_size: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if DECODERS.get(self.model.kind) != self.decoder.kind:
            raise EvaluationError(
                f"a {self.model.kind} with a {self.decoder.kind}: expected one of "
                + ", ".join(f"{model} with {decoder}" for model, decoder in DECODERS.items())
            )
        self.batch_size = _whole_shares(self.batch_size, self.mesh)
        self.model.spread(self.mesh)
        self.decoder.spread(self.mesh)
        self.num_classes: int = self.model.config.num_classes
        self.image_size = self._image_size()
        self.fingerprint = f"{self.model.fingerprint}+{self.decoder.fingerprint}"

    def __call__(
        self, labels: np.ndarray, *, first_index: int, seed: int, cfg_scale: float
    ) -> np.ndarray:
        """Labels int [B] -> uint8 [B, H, W, 3]; sample j of them has the index first_index + j.

        Raises:
          EvaluationError: the model gives NaN or infinity.
          ValueError: a label or setting that the model refuses.
        """
        size = self.batch_size
        # Always whole batches: they divide over the mesh, and there is one compiled program.
        padded = np.pad(labels, (0, -len(labels) % size), "edge")
        settings = dict(seed=seed, first_index=first_index, cfg_scale=cfg_scale, **self.options)
        with sharding.use(self.mesh):
            samples = self.model.sample(padded, batch_size=size, **settings)
            images = self._decode(samples)
        return as_uint8(images[: len(labels)], f"samples from {first_index} on")

    def _image_size(self) -> int:
        if self.model.kind == "generator":
            return self.decoder.config.image_size
        return self.model.config.scales[-1] * self.decoder.config.stride

    def _decode(self, samples: np.ndarray) -> np.ndarray:
        if self.model.kind == "generator":
            return decode_enlarged(self.decoder, samples, samples.shape[1], self.batch_size)
        return self.decoder.decode(samples, batch_size=self.batch_size)


@dataclasses.dataclass
class Reconstructor:
    """A tokenizer or VAE: images -> what is left of them, spread over a mesh."""

    model: Any
    mesh: Mesh
    batch_size: int
    seed: int = 0
    noise_top: int = 50
    image_size: int | None = None

    def __post_init__(self):
        if self.model.kind not in DECODERS.values():
            raise EvaluationError(f"a {self.model.kind} reconstructs nothing: expected a tokenizer")
        self.batch_size = _whole_shares(self.batch_size, self.mesh)
        self.model.spread(self.mesh)
        # A VAE takes any size; 256 is customary.
        self.image_size = self.image_size or getattr(self.model.config, "image_size", 256)

    def __call__(
        self, images: np.ndarray, counts: list[int], groups: list[int], *, first_index: int
    ) -> dict[str, np.ndarray]:
        """Reconstructions by name, uint8 [B, R, R, 3].

        Args:
          images: uint8 [B, R, R, 3].
          counts: token counts, each "N tokens"; of a VAE none, its one result is "latents".
          groups: of the self-correction test: the group is perturbed, and what
            follows either stays ("group M noisy") or is encoded again ("group M corrected").
          first_index: index of the first image, which its noise depends on.
        """
        size = self.batch_size
        padded = np.pad(images, [(0, -len(images) % size), (0, 0), (0, 0), (0, 0)], "edge")
        indices = (first_index + np.arange(len(padded))).astype(np.int32)
        with sharding.use(self.mesh):
            found = dict(self._reconstruct(padded, counts, groups, indices))
        return {
            name: as_uint8(x[: len(images)], f"{name}, images from {first_index} on")
            for name, x in found.items()
        }

    def names(self, counts: list[int], groups: list[int]) -> list[str]:
        """Names of the reconstructions that a call gives."""
        if self.model.kind == "vae":
            return ["latents"]
        noisy = [f"group {group} {kind}" for group in groups for kind in ("noisy", "corrected")]
        return [*(f"{count} tokens" for count in counts), *noisy]

    def _reconstruct(self, images, counts, groups, indices):
        model, size = self.model, self.batch_size
        if model.kind == "vae":
            mean, _ = model.encode(images, batch_size=size)
            yield "latents", model.decode(model.network.scale(mean), batch_size=size)
            return
        codes = model.encode(images, batch_size=size)
        for count in counts:
            yield f"{count} tokens", decode_enlarged(model, codes, count, size)
        for group in groups:
            pair = [
                self._noisy(images[i : i + size], indices[i : i + size], group)
                for i in range(0, len(images), size)
            ]
            for kind, part in zip(("noisy", "corrected"), zip(*pair, strict=True), strict=True):
                codes = np.concatenate(part)
                yield f"group {group} {kind}", decode_enlarged(model, codes, codes.shape[1], size)

    def _noisy(self, images, indices, group: int) -> tuple[np.ndarray, np.ndarray]:
        network, params = self.model.network, self.model.params
        position = jnp.int32(group * network.config.group_size)
        both = noisy_codes(network, params, images, indices, position, self.seed, self.noise_top)
        return tuple(np.asarray(codes) for codes in both)


@functools.partial(jax.jit, static_argnames=("network", "top"))
def noisy_codes(network, params, images, indices, position, seed, top: int = 50):
    """Codes with noise at one place, and with what follows encoded again to correct for it.

    Args:
      network: the tokenizer's module.
      params: its parameters.
      images: uint8 [B, R, R, 3].
      indices: int32 [B]; the noise of an image depends on the seed and its index alone.
      position: int32, the first perturbed token: a whole group, or inside the causal first tokens
        this one alone, as in training.
      seed: of the noise.
      top: a perturbed token becomes one of its so many nearest codes.

    Returns:
      (clean, noisy, clean) and (clean, noisy, corrected), int32 [B, N] each.
    """
    c = network.config
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
    draw = lambda key: jax.random.randint(key, (c.num_tokens,), 0, min(top, c.codebook_size))  # noqa: E731
    span = correction.span_of(jnp.full(len(images), position), c.group_size, c.causal)
    pair = network.apply(
        {"params": params},
        pixels.to_float(images),
        span,
        jax.vmap(draw)(keys),
        method="encode_pair",
    )
    clean, corrected = pair.triplet[..., 0], pair.triplet[..., 1]
    return correction.splice(span, clean, corrected, clean), corrected


def as_uint8(images: np.ndarray, what: str) -> np.ndarray:
    """Float [-1, 1] -> uint8 as published; refuses NaN, which would pass as some colour.

    Raises:
      EvaluationError: NaN or infinity.
    """
    if not np.isfinite(images).all():
        raise EvaluationError(f"{what}: the model gives NaN or infinity, its weights are damaged")
    return np.asarray(pixels.to_uint8(images))


def _whole_shares(batch_size: int, mesh: Mesh) -> int:
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}: expected at least 1")
    parts = split_count(mesh)
    return -(-batch_size // parts) * parts
