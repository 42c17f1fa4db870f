"""Images that a model makes or reconstructs, as evaluation takes them: uint8, spread over a mesh.

Shapes: B images or samples, H x W pixels, R the model's image side, N tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.inference import api, noise, programs
from detailflow_jax.inference.batching import in_batches, whole_shares
from detailflow_jax.inference.checks import check_labels
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.sampling import DECODERS, sampling
from detailflow_jax.models.sampler import sample_keys


@dataclasses.dataclass
class Sampler:
    """A generating model with its decoder: labels -> images.

    Sample i depends on the seed and on i alone. `options` are settings of the model's `sample`.
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
        self.batch_size = whole_shares(self.batch_size, self.mesh)
        self.model.spread(self.mesh)
        self.decoder.spread(self.mesh)
        self.num_classes: int = self.model.config.num_classes
        self.image_size = image_size(self.model.config, self.decoder.config)
        self.fingerprint = f"{self.model.fingerprint}+{self.decoder.fingerprint}"

    def __call__(
        self, labels: Int[np.ndarray, " B"], *, first_index: int, seed: int, cfg_scale: float
    ) -> UInt8[np.ndarray, "B R R 3"]:
        """Images of labels; sample j of them has the index first_index + j.

        Raises:
          EvaluationError: the model gives NaN or infinity.
          InputError: a label or setting out of range.
        """
        check_labels(labels, self.num_classes)
        setting = sampling(self.model.network, cfg_scale, **self.options)

        def make(labels, indices):
            samples = setting(self.model.params, labels, seed, indices)
            return programs.decode_whole(self.decoder.network, self.decoder.params, samples)

        indices = first_index + np.arange(len(labels))
        rows = labels.astype(np.int32), indices.astype(np.int32)
        what = f"samples from {first_index} on"
        return images_of(make, self.batch_size, *rows, mesh=self.mesh, what=what)


@dataclasses.dataclass
class Reconstructor:
    """A tokenizer or VAE: images -> what is left of them."""

    model: Any
    mesh: Mesh
    batch_size: int
    seed: int = 0
    noise_top: int = 50
    image_size: int | None = None

    def __post_init__(self):
        if self.model.kind not in DECODERS.values():
            raise EvaluationError(f"a {self.model.kind} reconstructs nothing: expected a tokenizer")
        self.batch_size = whole_shares(self.batch_size, self.mesh)
        self.model.spread(self.mesh)
        # A VAE takes any size; 256 is customary.
        self.image_size = self.image_size or getattr(self.model.config, "image_size", 256)

    def __call__(
        self,
        images: UInt8[np.ndarray, "B R R 3"],
        counts: Sequence[int],
        groups: Sequence[int],
        *,
        indices: Int[np.ndarray, " B"],
    ) -> dict[str, UInt8[np.ndarray, "B R R 3"]]:
        """Reconstructions by name.

        Args:
          images: the originals.
          counts: token counts, each "N tokens"; none for a VAE, whose one result is "latents".
          groups: of the self-correction test: the group is perturbed, and what follows is either
            left as it was ("group M noisy") or encoded again ("group M corrected").
          indices: of the images, which their noise depends on.
        """

        make = functools.partial(self._reconstruct, counts=counts, groups=groups)
        rows, what = (images, indices.astype(np.int32)), f"images from {indices[0]} on"
        return images_of(make, self.batch_size, *rows, mesh=self.mesh, what=what)

    def names(self, counts: Sequence[int], groups: Sequence[int]) -> list[str]:
        """Names of the reconstructions that a call gives."""
        if self.model.kind == "vae":
            return ["latents"]
        noisy = [f"group {group} {kind}" for group in groups for kind in ("noisy", "corrected")]
        return [*(f"{count} tokens" for count in counts), *noisy]

    def _reconstruct(self, images, indices, *, counts, groups) -> dict[str, Any]:
        network, params = self.model.network, self.model.params
        if self.model.kind == "vae":
            return {"latents": programs.reconstruct(network, params, images)}
        codes = programs.encode(network, params, images)
        prefixes = {f"{count} tokens": codes[:, :count] for count in counts}
        for group in groups:
            noisy, corrected = self._noisy(images, indices, group)
            prefixes |= {f"group {group} noisy": noisy, f"group {group} corrected": corrected}
        decode = functools.partial(programs.decode_whole, network, params)
        return {name: decode(prefix) for name, prefix in prefixes.items()}

    def _noisy(self, images, indices, group: int) -> tuple[Any, Any]:
        """Codes with noise in a group, and with what follows corrected: int32 [B, N] each."""
        c, position = self.model.config, group * self.model.config.group_size
        triplets = noise.encode_triplets(
            self.model.network,
            self.model.params,
            images,
            sample_keys(self.seed, indices),
            top=self.noise_top,
            position=jnp.int32(position),
        )
        return noise.uncorrected(triplets, position, c.group_size, c.causal), triplets[..., 1]


def image_size(config: Any, decoder: Any) -> int:
    """Side in pixels of what a decoder makes of samples, by the configurations of both networks."""
    return getattr(decoder, "image_size", None) or config.scales[-1] * decoder.stride


def images_of(
    function: Callable[..., Any], batch_size: int, *rows: np.ndarray, mesh: Mesh, what: str
) -> Any:
    """The uint8 images, or a tree of them, that `function` makes of rows, in batches over a mesh.

    Raises:
      EvaluationError: NaN or infinity; the text names the images by `what`.
    """

    def finish(images: np.ndarray) -> UInt8[np.ndarray, "B R R 3"]:
        try:
            return api.to_uint8(images)
        except InputError as error:
            raise EvaluationError(f"{what}: {error}") from error

    finish_all = functools.partial(jax.tree.map, finish)
    return in_batches(function, batch_size, *rows, mesh=mesh, whole=True, finish=finish_all)
