"""The two samplers with their settings, as pure functions from labels to codes or latents.

Shapes: B samples, N tokens, n <= N tokens asked for, K scales, S side of the latent, C channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from detailflow_jax.inference import programs
from detailflow_jax.inference.checks import (
    check_flow_settings,
    check_guidance,
    check_steps,
    check_whole,
)
from detailflow_jax.inference.errors import InputError, as_input_error
from detailflow_jax.inference.rules import Rule, as_rules, published_rules
from detailflow_jax.models import flow_sampler, sampler
from detailflow_jax.models.flowar import FlowAR
from detailflow_jax.models.generator import Transformer
from detailflow_jax.ops import Array, logits
from detailflow_jax.ops.objectives import GRIDS, OBJECTIVES

DECODERS = {"generator": "tokenizer", "flowar": "vae"}
"""Network that samples -> network that makes images of its samples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """One setting of a sampler.

    Attributes:
      run: (params, labels int32 [B], keys [B], guidance, **given) -> codes int32 [B, n], or
        latents float32 [B, S, S, C].
      guidance: of every token, [N], or of every scale, [K]. An argument of `run`, so that another
        guidance scale does not compile again.
      note: what is sampled, as the log says it.
      stream: as `run`, but gives the codes so far after each group; None for latents.
    """

    run: Callable[..., Array]
    guidance: Float[np.ndarray, " G"]
    note: str
    stream: Callable[..., Iterator[Array]] | None = None

    def __call__(
        self,
        params: Any,
        labels: Int[Array, " B"],
        seed: int,
        indices: Int[Array, " B"],
        **given: Any,
    ) -> Shaped[Array, "B ..."]:
        """Samples of labels; each depends on the seed and its own index alone.

        What may be given: the `prefix` of codes; the `noise` and what is `known` of latents.
        """
        keys = sampler.sample_keys(seed, indices)
        return self.run(params, labels, keys, self.guidance, **given)


def sampling(network: Transformer | FlowAR, cfg_scale: float, **settings: Any) -> Sampling:
    """`sample_codes` or `sample_latents`, whichever fits the network."""
    if isinstance(network, FlowAR):
        return sample_latents(network, cfg_scale, **settings)
    return sample_codes(network, cfg_scale, **settings)


def sample_codes(
    network: Transformer,
    cfg_scale: float = 1.5,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    gradual_cfg: bool = False,
    greedy: bool = False,
    num_tokens: int | None = None,
    rules: Rule | Sequence[Any] | None = None,
    num_steps: int | None = None,
    continuous: bool = False,
) -> Sampling:
    """The generator's sampler; the settings are those of `Generator.sample`.

    Raises:
      InputError: a setting out of range, one that does not apply to the network's head, or rules
        beside the settings that they replace.
    """
    c = network.config
    num_tokens = c.num_tokens if num_tokens is None else check_whole("num_tokens", num_tokens)
    with as_input_error():
        c.check_num_tokens(num_tokens)
    cfg_scale, top_k = check_guidance(cfg_scale), check_whole("top_k", top_k, 0)
    given = published_rules(temperature, 0 if top_k >= c.codebook_size else top_k, top_p, greedy)
    if rules is not None and given != published_rules():
        raise InputError(
            "rules replace temperature, top_k, top_p and greedy; pass these as rules too"
        )
    chosen = given if rules is None else as_rules(rules)
    options = sampler.SamplingOptions(num_tokens, guided=cfg_scale != 1.0)
    note = f"{num_tokens} tokens"
    if c.head == "flow":
        if chosen != published_rules():
            raise InputError(
                "this generator has a flow head, which gives no logits: temperature, top_k, top_p, "
                "greedy and rules do not apply to it; expected cfg_scale, gradual_cfg, num_steps "
                "or continuous"
            )
        num_steps = 25 if num_steps is None else check_whole("num_steps", num_steps)
        with as_input_error():
            (times,) = flow_sampler.flow_times(1, num_steps)
        options = dataclasses.replace(options, times=times, continuous=continuous)
        chosen, note = (), f"{note}, {num_steps} flow steps a group"
    elif num_steps is not None or continuous:
        raise InputError(
            "num_steps and continuous are for a generator with a flow head (head=flow); this one "
            "draws codes from logits"
        )
    guidance = logits.guidance_scales(
        cfg_scale, c.num_tokens, c.group_size, c.causal, gradual=gradual_cfg
    )

    def run(params, labels, keys, guidance, prefix=None):
        rows = labels, keys, guidance
        return sampler.sample(network, params, *rows, chosen, prefix, options=options)

    def stream(params, labels, keys, guidance):
        return sampler.stream(network, params, labels, keys, guidance, chosen, options=options)

    return Sampling(run, guidance, note, stream)


def sample_latents(
    network: FlowAR,
    cfg_scale: float = 2.4,
    num_steps: int | Sequence[int] = 25,
    guidance_high: float = 0.9,
    guidance_low: float = 0.0,
    grid: str | None = None,
    solver: str | None = None,
) -> Sampling:
    """FlowAR's sampler; the settings are those of `FlowAR.sample`.

    Raises:
      InputError: a setting out of range.
    """
    objective = network.config.objective
    solver = solver or OBJECTIVES[objective].default
    cfg_scale, num_steps = check_guidance(cfg_scale), check_steps(num_steps)
    check_flow_settings(guidance_low, guidance_high, solver, objective)
    scales = len(network.config.scales)
    grid = grid or GRIDS[solver]
    with as_input_error():
        times = flow_sampler.flow_times(scales, num_steps, grid)
    options = flow_sampler.FlowSamplingOptions(
        times,
        guided=cfg_scale != 1.0,
        guidance_low=guidance_low,
        guidance_high=guidance_high,
        solver=solver,
    )

    def run(params, labels, keys, factors, noise=None, known=None):
        rows = labels, keys, factors
        return flow_sampler.sample(network, params, *rows, noise, known, options=options)

    guidance = flow_sampler.guidance_factors(cfg_scale, scales)
    return Sampling(run, guidance, f"{scales} scales of {num_steps} flow steps")


def sampling_of(config: Any, cfg_scale: float) -> Sampling:
    """The sampler, with its published settings, of a configuration whose task is in `DECODERS`."""
    return sampling(programs.network_of(config), cfg_scale)
