"""What `import detailflow_jax as df` offers: trained models as plain functions on arrays.

    tok = df.load_tokenizer("runs/tok")
    gen = df.load_generator("runs/gen")
    images = tok.decode(gen.sample([3, 1, 4], seed=0, cfg_scale=1.5))

Shapes: B images or samples, N tokens, n <= N tokens asked for, V codes.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from detailflow_jax.convert import export, load
from detailflow_jax.models import generator as generator_network
from detailflow_jax.models import layers, sampler
from detailflow_jax.models import tokenizer as tokenizer_network
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import logits as filters


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> "Tokenizer":
    """A tokenizer from a run of this project or from a published checkpoint.

    Args:
      path: the workdir of a run; or a published folder or file (.pt, .pth, .ckpt, .bin,
        .safetensors, shards), local or gs://; or hf:OWNER/NAME[@REVISION][/FILE].
      weights: "model" or "ema". Default: of a run the average where it keeps one; of a published
        tokenizer "model", of a published generator "ema". Where a file holds only the other set,
        that one is read, and a warning says so.
      step: of a run, which checkpoint; default the newest complete one.
      allow_missing: start a parameter anew for which a published file holds no tensor.
      allow_unused: leave tensors of a published file aside that belong to no parameter.
      **overrides: what shapes cannot tell, by name: `encoder_num_heads`, `decoder_num_heads`
        (a generator's `num_heads`), `group_size`, `causal_num`, `image_size` (a generator's
        `num_tokens`), or any other field of the network's configuration.

    Raises:
      ConfigError, CheckpointError: nothing to load there, not of this kind, or sizes that
        contradict each other; the text says what is wrong and what to do.
      ValueError: an unknown override or value of `weights`.
    """
    allow = {"allow_missing": allow_missing, "allow_unused": allow_unused}
    return Tokenizer(*_load("tokenizer", path, weights, step, overrides, **allow))


def load_generator(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> "Generator":
    """A generator from a run or a published checkpoint; see `load_tokenizer`."""
    allow = {"allow_missing": allow_missing, "allow_unused": allow_unused}
    return Generator(*_load("generator", path, weights, step, overrides, **allow))


def _load(kind: str, path, weights, step, overrides, **allow: bool) -> tuple[Any, Any, str]:
    """(configuration, parameters, origin); what the user should know is logged."""
    found = load.load(
        kind, path, weights=weights, step=step, scan=_scan(), overrides=overrides, **allow
    )
    for notice in found.notices:
        logging.warning("%s", notice)
    return found.config, found.params, found.source


def save_pytorch(
    model: "Tokenizer | Generator", path: str | os.PathLike[str], *, overwrite: bool = False
) -> pathlib.Path:
    """Writes a model in the published layout, which the published code loads with strict=True.

    Args:
      model: a tokenizer or generator.
      path: a folder to make (config.json, config.yaml, checkpoints/N.pt), or a file ending in
        .pt, .pth, .ckpt, .bin or .safetensors, with the two configurations beside it.
      overwrite: whether a checkpoint at `path` may be replaced.

    Returns:
      the path written.

    Raises:
      CheckpointError: something is at `path`, or PyTorch is missing for a PyTorch file.
    """
    done = export.export(model.kind, model.config, model.params, path, overwrite=overwrite)
    for notice in done.notices:
        logging.warning("%s: %s", done.path, notice)
    return done.path


def check_pair(tokenizer: "Tokenizer", generator: "Generator") -> None:
    """Raises ValueError unless the generator writes codes that this tokenizer reads."""
    for field in ("codebook_size", "num_tokens", "group_size", "causal"):
        theirs, ours = getattr(generator.config, field), getattr(tokenizer.config, field)
        if theirs != ours:
            raise ValueError(
                f"{generator.source} and {tokenizer.source} do not belong together: {field} is "
                f"{theirs} in the generator and {ours} in the tokenizer; expected a generator "
                "trained on the codes of this tokenizer"
            )


def _scan() -> bool:
    # A scan slices stacked weights at every layer, which a CPU pays for and others do not.
    return jax.default_backend() != "cpu"


class _Model:
    """A network's configuration and parameters, laid out for this machine's backend."""

    kind: str

    def __init__(self, network: Callable, config: Any, params: Mapping[str, Any], source: str):
        """Args: the Linen module class, its config, scanned or unrolled parameters, the origin."""
        scan = _scan()
        self.config = dataclasses.replace(config, scan=scan)
        params = (layers.stack_layers if scan else layers.unstack_layers)(params)
        # Unlike `jnp.asarray`, this takes suitable host memory over without a copy.
        self.params = jax.device_put(params)
        self.network = network(self.config)
        self.source = source

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters, the same in either layout and on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        stacked = layers.stack_layers(self.params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf))
        return digest.hexdigest()

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<{type(self).__name__} {count / 1e6:.1f}M parameters from {self.source}>"


class Tokenizer(_Model):
    """Images to codes and back."""

    kind = "tokenizer"

    def __init__(self, config: tokenizer_network.TokenizerConfig, params, source: str = "memory"):
        super().__init__(tokenizer_network.Tokenizer, config, params, source)

    def encode(self, images: Any, *, batch_size: int = 64) -> np.ndarray:
        """Images -> codes.

        Args:
          images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the patch.
          batch_size: images a call of the compiled program.

        Returns:
          int32 [B, N].

        Raises:
          ValueError, TypeError: another shape or type.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape}, expected [B, H, W, 3]")
        return _in_batches(lambda x: _encode(self.network, self.params, x), batch_size, images)

    def decode(self, codes: Any, size: int | None = None, *, batch_size: int = 64) -> np.ndarray:
        """Codes -> images.

        Args:
          codes: int [B, n] with n valid for the model: 1..causal_num, then multiples of a group.
          size: side of the images in pixels, a multiple of the decoder's patch; default what n
            tokens map to.
          batch_size: images a call of the compiled program.

        Returns:
          float32 [B, size, size, 3], about [-1, 1].

        Raises:
          ValueError: codes out of range, or n or size not valid.
        """
        codes = np.asarray(codes)
        _check_codes(codes, self.config.codebook_size)
        full = self.config.resolutions.decoded_size(codes.shape[1])
        size = full if size is None else size
        return _in_batches(lambda x: _decode(self.network, self.params, x, size), batch_size, codes)


class Generator(_Model):
    """Labels to codes."""

    kind = "generator"

    def __init__(self, config: generator_network.GeneratorConfig, params, source: str = "memory"):
        super().__init__(generator_network.Generator, config, params, source)

    def sample(
        self,
        labels: Sequence[int],
        seed: int = 0,
        cfg_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        gradual_cfg: bool = False,
        greedy: bool = False,
        num_tokens: int | None = None,
        *,
        first_index: int = 0,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Codes for labels; sample i depends on `seed` and `first_index + i` alone.

        Args:
          labels: class numbers in [0, num_classes), [B].
          seed: of the whole set of samples.
          cfg_scale: classifier-free guidance >= 1; at 1 no null half is computed.
          temperature: > 0; divides the logits.
          top_k: keep the k most likely codes; 0 keeps all.
          top_p: keep the most likely codes of this total probability, in (0, 1].
          gradual_cfg: lower the guidance group by group.
          greedy: take the most likely code.
          num_tokens: n; default N.
          first_index: index of the first sample, when a set is made in parts.
          batch_size: samples a call of the compiled program.

        Returns:
          int32 [B, n].

        Raises:
          ValueError: a label or setting out of range.
        """
        c = self.config
        num_tokens = c.num_tokens if num_tokens is None else num_tokens
        c.check_num_tokens(num_tokens)
        labels = np.asarray(labels)
        _check_labels(labels, c.num_classes)
        _check_settings(cfg_scale, temperature, top_k, top_p)
        options = sampler.SamplingOptions(
            num_tokens=num_tokens,
            guided=cfg_scale != 1.0,
            greedy=greedy,
            top_k=0 if top_k >= c.codebook_size else top_k,
            use_top_p=top_p < 1.0,
        )
        scales = filters.guidance_scales(
            cfg_scale, c.num_tokens, c.group_size, c.causal, gradual=gradual_cfg
        )

        def run(rows: np.ndarray) -> jax.Array:
            return sampler.sample(
                self.network,
                self.params,
                rows[:, 0],
                sampler.sample_keys(seed, rows[:, 1]),
                scales,
                jnp.float32(temperature),
                jnp.float32(top_p),
                options=options,
            )

        indices = first_index + np.arange(len(labels))
        rows = np.stack([labels, indices], axis=1).astype(np.int32)
        return _in_batches(run, batch_size, rows)

    def logits(self, codes: Any, labels: Sequence[int], *, batch_size: int = 64) -> np.ndarray:
        """Teacher-forced logits: float32 [B, N, V], from codes int [B, N] and labels [B].

        A label of num_classes stands for the null class.
        """
        c = self.config
        codes, labels = np.asarray(codes), np.asarray(labels)
        _check_codes(codes, c.codebook_size)
        _check_labels(labels, c.num_classes + 1)
        read = c.num_tokens - c.group_size  # the last group is predicted only, unless all is causal
        if codes.shape[1] not in (c.num_tokens, max(read, c.causal)):
            raise ValueError(f"codes have {codes.shape[1]} tokens, expected {c.num_tokens}")
        rows = np.concatenate([labels[:, None], codes], axis=1).astype(np.int32)
        return _in_batches(
            lambda x: _logits(self.network, self.params, x[:, 1:], x[:, 0]), batch_size, rows
        )


# ---------------------------------------------------------------------------- compiled functions


@functools.partial(jax.jit, static_argnums=0)
def _encode(network, params, images):
    return network.apply({"params": params}, pixels.to_float(images), method="encode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(network, params, codes, size):
    return network.apply({"params": params}, codes, size, method="decode_codes")


@functools.partial(jax.jit, static_argnums=0)
def _logits(network, params, codes, labels):
    return network.apply({"params": params}, codes, labels)


def _in_batches(function: Callable, batch_size: int, rows: np.ndarray) -> np.ndarray:
    """`function` over equal batches of rows, the last one padded: one compile, any length."""
    if len(rows) <= batch_size:
        return np.asarray(function(rows))
    padded = np.pad(rows, [(0, -len(rows) % batch_size)] + [(0, 0)] * (rows.ndim - 1), "edge")
    parts = [function(padded[i : i + batch_size]) for i in range(0, len(padded), batch_size)]
    return np.concatenate([np.asarray(part) for part in parts])[: len(rows)]


# ---------------------------------------------------------------------------------------- checks


def _check_codes(codes: np.ndarray, codebook_size: int) -> None:
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, expected integers [B, n]")
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {codebook_size}): "
            "are they of another tokenizer?"
        )


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected integers [B], B > 0")
    wrong = sorted({int(x) for x in labels if not 0 <= x < num_classes})
    if wrong:
        raise ValueError(f"labels {wrong[:5]} are out of range, expected 0..{num_classes - 1}")


def _check_settings(cfg_scale: float, temperature: float, top_k: int, top_p: float) -> None:
    if not cfg_scale >= 1.0:
        raise ValueError(f"cfg_scale={cfg_scale}, expected >= 1 (1 means no guidance)")
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature}, expected > 0; for the mode use greedy=True")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}, expected >= 0 (0 keeps every code)")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}, expected in (0, 1]")
