"""What trained parameters are for, as pure functions: samples of labels, images of samples.

Shapes: B samples or images, R image side.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from detailflow_jax.models import flow_sampler, sampler
from detailflow_jax.models.flowar import FlowAR
from detailflow_jax.models.generator import Generator
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import logits
from detailflow_jax.tasks import flowar, generator, tokenizer, vae

DECODERS = {"generator": "tokenizer", "flowar": "vae"}
"""Task that generates -> kind of what makes images of its samples."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a task samples, with its published settings.

    Attributes:
      run: (params, labels int32 [B], keys [B], guidance [G]) -> codes int32 [B, N], or latents
        float32 [B, S, S, C].
      guidance: float32 [G], of every group or scale.
      note: what is sampled, for people.
    """

    run: Callable
    guidance: np.ndarray
    note: str


def sampling(config: Any, cfg_scale: float) -> Sampling:
    """The sampler of a configuration whose task is one of `DECODERS`."""
    return {"generator": _codes, "flowar": _latents}[config.task](config, cfg_scale)


def _codes(config: Any, cfg_scale: float) -> Sampling:
    network = Generator(generator.model_config(config.model))
    c, one = network.config, np.float32(1.0)
    options = sampler.SamplingOptions(c.num_tokens, guided=cfg_scale != 1.0)
    guidance = logits.guidance_scales(cfg_scale, c.num_tokens, c.group_size, c.causal)

    def run(params, labels, keys, guidance):
        return sampler.sample(network, params, labels, keys, guidance, one, one, options=options)

    return Sampling(run, guidance, f"{c.num_tokens} tokens")


def _latents(config: Any, cfg_scale: float, steps: int = 25) -> Sampling:
    network = FlowAR(flowar.model_config(config.model))
    scales = len(network.config.scales)
    options = flow_sampler.FlowSamplingOptions(
        flow_sampler.flow_times(scales, steps), guided=cfg_scale != 1.0, guidance_high=0.9
    )

    def run(params, labels, keys, factors):
        return flow_sampler.sample(network, params, labels, keys, factors, options=options)

    factors = flow_sampler.guidance_factors(cfg_scale, scales)
    return Sampling(run, factors, f"{scales} scales of {steps} flow steps")


def decoding(c: TokenizerConfig | VAEConfig) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, codes of all tokens or latents) -> images float32 [B, R, R, 3], about [-1, 1]."""
    if isinstance(c, VAEConfig):
        return lambda params, latents: VAE(c).apply({"params": params}, latents, method="decode")

    def decode(params, codes):
        return Tokenizer(c).apply({"params": params}, codes, c.image_size, method="decode_codes")

    return decode


def reconstruction(config: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, uint8 [B, R, R, 3]) -> float32 of that shape: by all tokens, or the mean latent."""
    if config.task == "vae":
        network = VAE(vae.model_config(config.model))
        return lambda params, images: network.apply({"params": params}, pixels.to_float(images))[0]
    c = tokenizer.model_config(config.model)
    decode = decoding(c)

    def reconstruct(params, images):
        variables = {"params": params}
        codes = Tokenizer(c).apply(variables, pixels.to_float(images), method="encode")
        return decode(params, codes)

    return reconstruct
