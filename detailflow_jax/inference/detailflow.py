"""The DetailFlow part of the door: tokenizer and generator as plain functions on arrays.

Shapes: B images or samples, N tokens, n <= N tokens asked for, V codes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.inference.model import Model, check_labels
from detailflow_jax.models import generator as generator_network
from detailflow_jax.models import sampler
from detailflow_jax.models import tokenizer as tokenizer_network
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import logits as filters


class Tokenizer(Model):
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
        return self.in_batches(lambda x: _encode(self.network, self.params, x), batch_size, images)

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
        return self.in_batches(
            lambda x: _decode(self.network, self.params, x, size), batch_size, codes
        )


class Generator(Model):
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
        check_labels(labels, c.num_classes)
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
        return self.in_batches(run, batch_size, rows)

    def logits(self, codes: Any, labels: Sequence[int], *, batch_size: int = 64) -> np.ndarray:
        """Teacher-forced logits: float32 [B, N, V], from codes int [B, N] and labels [B].

        A label of num_classes stands for the null class.
        """
        c = self.config
        codes, labels = np.asarray(codes), np.asarray(labels)
        _check_codes(codes, c.codebook_size)
        check_labels(labels, c.num_classes + 1)
        read = c.num_tokens - c.group_size  # the last group is predicted only, unless all is causal
        if codes.shape[1] not in (c.num_tokens, max(read, c.causal)):
            raise ValueError(f"codes have {codes.shape[1]} tokens, expected {c.num_tokens}")
        rows = np.concatenate([labels[:, None], codes], axis=1).astype(np.int32)
        return self.in_batches(
            lambda x: _logits(self.network, self.params, x[:, 1:], x[:, 0]), batch_size, rows
        )


@functools.partial(jax.jit, static_argnums=0)
def _encode(network, params, images):
    return network.apply({"params": params}, pixels.to_float(images), method="encode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(network, params, codes, size):
    return network.apply({"params": params}, codes, size, method="decode_codes")


@functools.partial(jax.jit, static_argnums=0)
def _logits(network, params, codes, labels):
    return network.apply({"params": params}, codes, labels)


def _check_codes(codes: np.ndarray, codebook_size: int) -> None:
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, expected integers [B, n]")
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {codebook_size}): "
            "are they of another tokenizer?"
        )


def _check_settings(cfg_scale: float, temperature: float, top_k: int, top_p: float) -> None:
    if not cfg_scale >= 1.0:
        raise ValueError(f"cfg_scale={cfg_scale}, expected >= 1 (1 means no guidance)")
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature}, expected > 0; for the mode use greedy=True")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}, expected >= 0 (0 keeps every code)")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}, expected in (0, 1]")
