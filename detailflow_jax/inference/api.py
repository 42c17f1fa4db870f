"""What `import detailflow_jax as df` offers: trained models as plain functions on arrays.

tok = df.load_tokenizer("runs/tok")
gen = df.load_generator("runs/gen")
images = tok.decode(gen.sample([3, 1, 4], seed=0, cfg_scale=1.5))

vae = df.load_vae("runs/vae")
flow = df.load_flowar("runs/flowar")
images = vae.decode(flow.sample([3, 1, 4], seed=0, cfg_scale=2.4))
"""

import os
import pathlib
from typing import Any

from absl import logging

from detailflow_jax.convert import export, load
from detailflow_jax.inference.detailflow import Generator, Tokenizer
from detailflow_jax.inference.flowar import VAE, FlowAR
from detailflow_jax.inference.model import scans
from detailflow_jax.models.flowar import check_vae

__all__ = [
    "VAE",
    "FlowAR",
    "Generator",
    "Tokenizer",
    "check_pair",
    "load_flowar",
    "load_generator",
    "load_tokenizer",
    "load_vae",
    "save_pytorch",
]


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> Tokenizer:
    """A tokenizer from a run of this project or from a published checkpoint.

    Args:
      path: the workdir of a run; or a published folder or file (.pt, .pth, .ckpt, .bin,
        .safetensors, shards), local or gs://; or hf:OWNER/NAME[@REVISION][/FILE].
      weights: "model" or "ema". Default: of a run the average where it keeps one; of a published
        generator "ema", of others "model". Where a file holds only the other set, that one is
        read, and a warning says so.
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
) -> Generator:
    """A generator from a run or a published checkpoint; see `load_tokenizer`."""
    allow = {"allow_missing": allow_missing, "allow_unused": allow_unused}
    return Generator(*_load("generator", path, weights, step, overrides, **allow))


def load_vae(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> VAE:
    """An autoencoder from a run or a published checkpoint; see `load_tokenizer`.

    What its shapes cannot tell: `scale_factor` (default of a published file 0.2325 with 16 latent
    channels, 0.18215 with 4), `shift_factor`, `norm_groups`.
    """
    allow = {"allow_missing": allow_missing, "allow_unused": allow_unused}
    return VAE(*_load("vae", path, weights, step, overrides, **allow))


def load_flowar(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> FlowAR:
    """A FlowAR model from a run or a published checkpoint; see `load_tokenizer`.

    What its tensors cannot tell: `scales` where they are not 1, 2, 4, ..., and `buffer_size`.
    """
    allow = {"allow_missing": allow_missing, "allow_unused": allow_unused}
    return FlowAR(*_load("flowar", path, weights, step, overrides, **allow))


def _load(kind: str, path, weights, step, overrides, **allow: bool) -> tuple[Any, Any, str]:
    """(configuration, parameters, origin); what the user should know is logged."""
    found = load.load(
        kind, path, weights=weights, step=step, scan=scans(), overrides=overrides, **allow
    )
    for notice in found.notices:
        logging.warning("%s", notice)
    return found.config, found.params, found.source


def save_pytorch(
    model: Tokenizer | Generator | VAE | FlowAR,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model in the published layout, which the published code loads with strict=True.

    Args:
      model: what one of the functions above gave.
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


def check_pair(decoder: Tokenizer | VAE, model: Generator | FlowAR) -> None:
    """Raises ValueError unless the model makes codes, or latents, that the decoder reads."""
    if isinstance(decoder, VAE) and isinstance(model, FlowAR):
        check_vae(model.config, decoder.config.latent_channels, decoder.source)
        return
    if not (isinstance(decoder, Tokenizer) and isinstance(model, Generator)):
        raise ValueError(
            f"a {decoder.kind} and a {model.kind} do not belong together; expected a tokenizer "
            "and a generator, or a vae and a flowar"
        )
    for field in ("codebook_size", "num_tokens", "group_size", "causal"):
        theirs, ours = getattr(model.config, field), getattr(decoder.config, field)
        if theirs != ours:
            raise ValueError(
                f"{model.source} and {decoder.source} do not belong together: {field} is "
                f"{theirs} in the generator and {ours} in the tokenizer; expected a generator "
                "trained on the codes of this tokenizer"
            )
