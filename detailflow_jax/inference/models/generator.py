"""The generator on arrays: labels to codes.

The letters of shapes are those of the package.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from detailflow_jax.inference import programs
from detailflow_jax.inference.batching import pad, place, used, whole_shares
from detailflow_jax.inference.checks import (
    ArrayLike,
    as_array,
    check_codes,
    check_labels,
    check_seed,
)
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.models.base import Sampler
from detailflow_jax.inference.rules import Rule
from detailflow_jax.inference.sampling import Sampling, sample_codes
from detailflow_jax.models import sampler
from detailflow_jax.models.generator import GeneratorConfig
from detailflow_jax.runtime import sharding


class Generator(Sampler):
    """Labels to codes."""

    kind = "generator"
    config: GeneratorConfig

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
