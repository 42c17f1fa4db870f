"""The classes behind `df.load_*`: trained parameters with their methods on arrays.

Shapes: B images or samples, H x W pixels, N tokens, n <= N tokens asked for, V codes, h x w latent
positions, C latent channels, S side of the latent.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, Int, Int32, Shaped

from detailflow_jax.convert.fingerprint import encoder_fingerprint, fingerprint
from detailflow_jax.convert.registry import NETWORKS, with_scan
from detailflow_jax.inference import hub, programs
from detailflow_jax.inference.batching import in_batches, pad, place, used, whole_shares
from detailflow_jax.inference.checks import (
    ArrayLike,
    as_array,
    as_images,
    check_codes,
    check_images,
    check_known,
    check_labels,
    check_noise,
    check_seed,
    check_vectors,
    check_whole,
)
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.rules import Rule
from detailflow_jax.inference.sampling import Sampling, sample_codes, sample_latents
from detailflow_jax.models import autoencoder, layers, sampler
from detailflow_jax.models import flowar as flowar_network
from detailflow_jax.models import generator as generator_network
from detailflow_jax.models import tokenizer as tokenizer_network
from detailflow_jax.runtime import sharding


def scans() -> bool:
    """Whether layers are scanned on this backend."""
    # A scan slices stacked weights at every layer, which costs time on a CPU but not on others.
    return jax.default_backend() != "cpu"


class Model:
    """A network's configuration and parameters, laid out for this machine's backend.

    Attributes:
      kind: key of the network in the registry.
      config: of the network.
      network: the Linen module.
      params: its parameters, on the devices.
      source: where they come from.
      encoded_by: fingerprint of the encoder whose codes or latents it was trained on; "" where that
        is not known.
      class_names: in the order of the labels; empty where they are not known.
      mesh: what splits batches; None with one device.
    """

    kind: str
    config: Any
    network: Any

    def __init__(
        self,
        config: Any,
        params: Mapping[str, Any],
        source: str = "memory",
        encoded_by: str = "",
        class_names: tuple[str, ...] = (),
    ):
        """Takes parameters in the scanned or the unrolled layout."""
        scan = scans()
        self.config = with_scan(config, scan)
        params = (layers.stack_layers if scan else layers.unstack_layers)(params)
        # Unlike `jnp.asarray`, this uses suitable host memory without a copy.
        self.params = jax.device_put(params)
        self.network = NETWORKS[self.kind].module(self.config)
        self.source, self.encoded_by, self.class_names = source, encoded_by, class_names
        self.mesh: Mesh | None = None
        if jax.local_device_count() > 1:
            self.spread(sharding.make_mesh({}, jax.local_devices()))

    def spread(self, mesh: Mesh) -> None:
        """Copies the parameters to every device of a mesh, which splits batches from now on."""
        self.mesh = mesh
        self.params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))

    def run(
        self, program: Callable[..., Any], batch_size: int, *rows: Shaped[np.ndarray, "_ ..."]
    ) -> Shaped[np.ndarray, "B ..."]:
        """`program(network, params, *rows)` of all rows, in batches."""
        function = functools.partial(program, self.network, self.params)
        return in_batches(function, batch_size, *rows, mesh=self.mesh)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters, the same in either layout and on any machine."""
        return fingerprint(self.params)

    @functools.cached_property
    def encoder_fingerprint(self) -> str:
        """A hash of the parameters that decide the codes or latents of an image."""
        return encoder_fingerprint(self.kind, self.params)

    def push_to_hub(
        self,
        repo: str,
        *,
        workdir: str | None = None,
        results: Sequence[str] = (),
        picture: str | None = None,
        licence: str | None = None,
        pytorch: bool = False,
        private: bool = False,
        revision: str | None = None,
        message: str = "",
    ) -> str:
        """Uploads the model and a card to the Hugging Face hub; `df.load("hf:REPO")` loads it.

        Args:
          repo: "owner/name", made if it is not there.
          workdir: of the run that the card takes scores and a picture from; default the one that
            the model was loaded from.
          results: results.json of evaluations, whose figures the card has.
          picture: a PNG for the card; default the newest one of the run.
          licence: for the card, such as "apache-2.0".
          pytorch: also write the published PyTorch layout, in `pytorch/` (DC-AE: `diffusers/`).
          private: make the repository private, if it is made.
          revision: branch to commit to; default main.
          message: of the commit.

        Returns:
          the address of the commit.

        Raises:
          ConfigError: no such name, or a file for the card that cannot be used.
          HubError: the hub did not take it.
        """
        return hub.push(
            self,
            repo,
            workdir=workdir,
            results=results,
            picture=picture,
            licence=licence,
            pytorch=pytorch,
            private=private,
            revision=revision,
            message=message,
        )

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<{type(self).__name__} {count / 1e6:.1f}M parameters from {self.source}>"


def _indices(first: Any, count: int) -> Int32[np.ndarray, " B"]:
    """The indices of samples from `first` on; raises InputError unless they are int32."""
    return check_whole("first_index", first, 0, 2**31 - count) + np.arange(count, dtype=np.int32)


class _Sampler(Model):
    """A network that makes samples of labels."""

    def _sample(
        self,
        sampling: Sampling,
        labels: Int[np.ndarray, " B"],
        seed: int,
        first_index: int,
        batch_size: int,
        **given: Any,
    ) -> Shaped[np.ndarray, "B ..."]:
        """Samples; `given` is what the sampling takes besides, as trees of arrays of B rows."""
        parts, tree = jax.tree.flatten(given)
        seed, indices = check_seed(seed), _indices(first_index, len(labels))

        def run(network, params, labels, indices, *parts):
            return sampling(params, labels, seed, indices, **jax.tree.unflatten(tree, parts))

        rows = labels.astype(np.int32), indices, *parts
        return self.run(run, batch_size, *rows)

    def _classes(self, labels: ArrayLike | None, rows: int) -> Int[np.ndarray, " B"]:
        """The labels as the network knows them; None is the null class, `rows` times."""
        null = self.config.num_classes
        if labels is None:
            if not rows:
                raise InputError("labels are missing: only what is continued or kept needs none")
            return np.full(rows, null)
        labels = as_array("labels", labels)
        check_labels(labels, null)
        # Trained without classes: only the null class is known.
        return np.full_like(labels, null) if self.config.class_dropout == 1 else labels


class Tokenizer(Model):
    """Images to codes and back."""

    kind = "tokenizer"
    config: tokenizer_network.TokenizerConfig

    def encode(self, images: ArrayLike, *, batch_size: int = 64) -> Int32[np.ndarray, "B N"]:
        """Images -> codes.

        Args:
          images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the patch.
          batch_size: images per call of the compiled program.

        Raises:
          ValueError, TypeError: another shape or type.
        """
        images = as_images(images)
        check_images(images, 3, self.config.encoder.patch_size)
        return self.run(programs.encode, batch_size, images)

    def decode(
        self, codes: ArrayLike, size: int | None = None, *, batch_size: int = 64
    ) -> Float32[np.ndarray, "B s s 3"]:
        """Codes -> images.

        Args:
          codes: int [B, n] with n valid for the model: 1..causal_num, then multiples of a group;
            or the vectors of `Generator.sample(continuous=True)`, float [B, n, d].
          size: side of the images in pixels, a multiple of the decoder's patch; default what n
            tokens map to.
          batch_size: images per call of the compiled program.

        Returns:
          images about [-1, 1]. Values may leave this range: the decoder does not clip, and
          `df.to_uint8` does.

        Raises:
          ValueError: codes out of range, or n or size not valid.
        """
        codes = as_array("codes", codes)
        if codes.ndim == 3:
            check_vectors(codes, self.config.codebook_dim)
        else:
            check_codes(codes, self.config.codebook_size)
        full = self.config.resolutions.decoded_size(codes.shape[1])
        size = full if size is None else check_whole("size", size)
        decode = lambda network, params, codes: programs.decode(network, params, codes, size)  # noqa: E731
        return self.run(decode, batch_size, codes)


class Generator(_Sampler):
    """Labels to codes."""

    kind = "generator"
    config: generator_network.GeneratorConfig

    def sample(
        self,
        labels: ArrayLike | None,
        seed: int = 0,
        cfg_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        gradual_cfg: bool = False,
        greedy: bool = False,
        num_tokens: int | None = None,
        *,
        rules: Rule | Sequence[Any] | None = None,
        num_steps: int | None = None,
        continuous: bool = False,
        prefix: ArrayLike | None = None,
        first_index: int = 0,
        batch_size: int = 64,
    ) -> Shaped[np.ndarray, "B n ..."]:
        """Codes for labels, int32 [B, n]; sample i depends on `seed` and `first_index + i` alone.

        With a flow head, temperature, top_k, top_p, greedy and rules do not apply; without one,
        num_steps and continuous do not.

        Args:
          labels: class numbers in [0, num_classes), [B]; or None for no class, with a prefix.
          seed: of the whole set of samples.
          cfg_scale: classifier-free guidance >= 1; at 1 no null half is computed.
          temperature: > 0; divides the logits.
          top_k: keep the k most likely codes; 0 keeps all.
          top_p: keep the most likely codes of this total probability, in (0, 1].
          gradual_cfg: lower the guidance group by group.
          greedy: take the most likely code.
          num_tokens: n; default N.
          rules: one or several of `df.rules`, or your own, in place of temperature, top_k, top_p
            and greedy.
          num_steps: of the flow of each group; default 25.
          continuous: keep what the flow ends at in place of the nearest codes: float32 [B, n, d],
            vectors of length sqrt(d), which `Tokenizer.decode` takes.
          prefix: int [B, p], p <= n: the first codes, which the others continue. The prefix of a
            sample, with its seed and settings, gives the same sample again.
          first_index: index of the first sample, when a set is made in parts.
          batch_size: samples per call of the compiled program.

        Raises:
          ValueError: a label, code or setting out of range.
        """
        filters = temperature, top_k, top_p, gradual_cfg, greedy
        scale = 1.0 if labels is None else cfg_scale
        rest = num_tokens, rules, num_steps, continuous
        sampling = sample_codes(self.network, scale, *filters, *rest)
        if prefix is None:
            return self._sample(sampling, self._classes(labels, 0), seed, first_index, batch_size)
        padded = self._padded(prefix, num_tokens)
        classes = self._classes(labels, len(padded))
        return self._sample(sampling, classes, seed, first_index, batch_size, prefix=padded)

    def stream(
        self, labels: ArrayLike, seed: int = 0, cfg_scale: float = 1.5, **settings: Any
    ) -> Iterator[Shaped[np.ndarray, "B _ ..."]]:
        """The codes of `sample` so far, [B, g], [B, 2g] .. [B, n], each group as it is drawn.

        The samples are one batch. A group is one call of a compiled program, where `sample` is one
        program for all; the codes are the same.

        Args:
          labels, seed, cfg_scale: see `sample`.
          **settings: of `sample`, from temperature to continuous.

        Raises:
          ValueError: a label or setting out of range.
        """
        sampling = sample_codes(self.network, cfg_scale, **settings)
        classes = self._classes(labels, 0).astype(np.int32)
        return self._streamed(sampling, classes, seed)

    def _streamed(
        self, sampling: Sampling, labels: Int32[np.ndarray, " B"], seed: int
    ) -> Iterator[Shaped[np.ndarray, "B _ ..."]]:
        size = whole_shares(len(labels), self.mesh)
        rows = labels, np.arange(len(labels), dtype=np.int32)
        classes, indices = (place(pad(x, size), self.mesh) for x in rows)
        keys = sampler.sample_keys(check_seed(seed), indices)
        assert sampling.stream, "only codes are streamed"
        groups = sampling.stream(self.params, classes, keys, sampling.guidance)
        while True:
            with used(self.mesh):  # not around the loop, whose caller does other things in between
                codes = next(groups, None)
            if codes is None:
                return
            yield sharding.to_host(codes)[: len(labels)]

    def _padded(self, prefix: ArrayLike, num_tokens: int | None) -> Int32[np.ndarray, "B N"]:
        """A prefix of codes, followed by -1 up to all tokens."""
        prefix, c = as_array("the prefix", prefix), self.config
        check_codes(prefix, c.codebook_size)
        count = c.num_tokens if num_tokens is None else int(num_tokens)
        if prefix.shape[1] > count:
            raise InputError(f"the prefix has {prefix.shape[1]} codes, expected at most {count}")
        missing = c.num_tokens - prefix.shape[1]
        return np.pad(prefix.astype(np.int32), ((0, 0), (0, missing)), constant_values=-1)

    def logits(
        self, codes: ArrayLike, labels: ArrayLike, *, batch_size: int = 64
    ) -> Float32[np.ndarray, "B N V"]:
        """Teacher-forced logits of codes int [B, N] and labels [B].

        A label of num_classes stands for the null class.

        Raises:
          InputError: codes or labels out of range, or the network has a flow head.
        """
        c = self.config
        if c.head == "flow":
            raise InputError("this generator has a flow head, which gives no logits")
        codes, labels = as_array("codes", codes), as_array("labels", labels)
        check_codes(codes, c.codebook_size)
        check_labels(labels, c.num_classes + 1)
        read = c.num_tokens - c.group_size  # the last group is predicted only, unless all is causal
        if codes.shape[1] not in (c.num_tokens, max(read, c.causal)):
            raise InputError(f"codes have {codes.shape[1]} tokens, expected {c.num_tokens}")
        rows = codes.astype(np.int32), labels.astype(np.int32)
        return self.run(programs.logits, batch_size, *rows)


class VAE(Model):
    """Images to latents and back."""

    kind = "vae"
    config: autoencoder.AutoencoderConfig

    def encode(self, images: ArrayLike, *, batch_size: int = 16) -> "LatentPosterior":
        """Images -> the posterior over their latents.

        `vae.decode(vae.encode(images))` reconstructs. `mean, logvar = vae.encode(images)` gives
        the unscaled moments.

        Args:
          images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the stride.
          batch_size: images per call of the compiled program.

        Raises:
          ValueError, TypeError: another shape or type.
        """
        images = as_images(images)
        check_images(images, self.config.image_channels, self.config.stride)
        moments = self.run(programs.encode_moments, batch_size, images)
        return LatentPosterior(*np.split(moments, 2, axis=-1), self.network)

    def moments(self, images: ArrayLike) -> Float32[np.ndarray, "B h w moments"]:
        """`encode(images).moments`: mean and log-variance, unscaled."""
        return self.encode(images, batch_size=max(1, len(images))).moments

    def sample(
        self, images: ArrayLike, seed: int = 0, *, first_index: int = 0, batch_size: int = 16
    ) -> Float32[np.ndarray, "B h w C"]:
        """`encode(images).sample(seed)`: latents drawn from the posterior, scaled."""
        posterior = self.encode(images, batch_size=batch_size)
        return posterior.sample(seed, first_index=first_index)

    def decode(
        self, latents: "ArrayLike | LatentPosterior", *, batch_size: int = 16
    ) -> Float32[np.ndarray, "B H W c"]:
        """Latents -> images.

        Args:
          latents: scaled, float [B, h, w, C], as `FlowAR.sample` and the posterior's methods give
            them; or a posterior, of which the mode is decoded.
          batch_size: latents per call of the compiled program.

        Returns:
          images about [-1, 1]. Values may leave this range: the decoder does not clip, and
          `df.to_uint8` does.

        Raises:
          ValueError: another shape or type.
        """
        if isinstance(latents, LatentPosterior):
            latents = latents.mode()
        latents, channels = as_array("latents", latents), self.config.latent_channels
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise InputError(
                f"latents have shape {latents.shape}, expected [B, h, w, {channels}]: "
                f"{self.source} has {channels} latent channels"
            )
        if not np.issubdtype(latents.dtype, np.floating):
            raise InputError(f"latents are {latents.dtype}, expected floating point numbers")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity")
        return self.run(programs.decode_latents, batch_size, latents.astype(np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentPosterior(Sequence):
    """A Gaussian over the latents of images, from `VAE.encode`.

    `mode` and `sample` are scaled to about unit variance, which is what `VAE.decode` takes. The
    moments are unscaled; as a sequence the posterior is the pair (mean, logvar).

    Attributes:
      mean, logvar: unscaled, float32 [B, h, w, C].
      network: the autoencoder's module, which knows the scale.
    """

    mean: Float32[np.ndarray, "B h w C"]
    logvar: Float32[np.ndarray, "B h w C"]
    network: autoencoder.Autoencoder = dataclasses.field(repr=False)

    def mode(self) -> Float32[np.ndarray, "B h w C"]:
        """The most likely latents, scaled."""
        return np.asarray(self.network.scale(self.mean))

    def sample(self, seed: int = 0, *, first_index: int = 0) -> Float32[np.ndarray, "B h w C"]:
        """Latents drawn from the posterior, scaled.

        Args:
          seed: of all draws; that of image i depends on the seed and `first_index + i` alone.
          first_index: index of the first image, when a set is encoded in parts.
        """
        keys = sampler.sample_keys(check_seed(seed), _indices(first_index, len(self.mean)))
        return np.asarray(programs.draw_latents(self.network, self.mean, self.logvar, keys))

    @property
    def moments(self) -> Float32[np.ndarray, "B h w moments"]:
        """Mean and log-variance along the last axis, unscaled: what latent shards hold."""
        return np.concatenate([self.mean, self.logvar], axis=-1)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return (self.mean, self.logvar)[index]


class FlowAR(_Sampler):
    """Labels to latents."""

    kind = "flowar"
    config: flowar_network.FlowARConfig

    def sample(
        self,
        labels: ArrayLike | None,
        seed: int = 0,
        cfg_scale: float = 2.4,
        num_steps: int | Sequence[int] = 25,
        guidance_high: float = 0.9,
        guidance_low: float = 0.0,
        grid: str | None = None,
        solver: str | None = None,
        noise: Sequence[ArrayLike] | None = None,
        *,
        latents: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        first_index: int = 0,
        batch_size: int = 64,
    ) -> Float32[np.ndarray, "B S S C"]:
        """Latents for labels, scaled as `VAE.decode` takes them.

        Sample i depends on `seed` and `first_index + i` alone.

        Args:
          labels: class numbers in [0, num_classes), [B]; or None for no class, with latents.
          seed: of the whole set of samples.
          cfg_scale: guidance >= 1 at the last scale, rising from 1 at the first; at 1 no null half
            is computed. Published: 4.3 for S, 2.4 for L and H.
          num_steps: flow steps, one number or one per scale (annealing: later scales need fewer).
          guidance_high: guidance applies from this time on (1 is noise, 0 data).
          guidance_low: guidance applies down to this time.
          grid: of times, "published", "uniform" or "sde"; default what the solver is used with.
          solver: "euler" (default), "heun" (two evaluations per step) or "euler_maruyama" (an SDE);
            of a model that predicts noise "ddim" (default) or "ddpm" (draws noise).
          noise: one array [B, i^2, C] per scale of side i, or [2B, i^2, C] of which the null half
            is unused.
          latents: of images that are kept outside of the mask, float [B, S, S, C], scaled.
          mask: bool [B, S, S], true where latents are sampled anew.
          first_index: index of the first sample, when a set is made in parts.
          batch_size: samples per call of the compiled program.

        Raises:
          ValueError: a label or setting out of range.
        """
        flow = num_steps, guidance_high, guidance_low, grid, solver
        scale = 1.0 if labels is None else cfg_scale
        sampling = sample_latents(self.network, scale, *flow)
        given: dict[str, Any] = {}
        if latents is not None or mask is not None:
            given["known"] = check_known(latents, mask, self.config)
        classes = self._classes(labels, len(given["known"].mask) if given else 0)
        if noise is not None:
            given["noise"] = check_noise(noise, self.config, len(classes))
        return self._sample(sampling, classes, seed, first_index, batch_size, **given)
