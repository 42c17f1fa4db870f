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
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import UInt8

from detailflow_jax.convert import diffusers, export
from detailflow_jax.convert import load as loading
from detailflow_jax.inference import rules as rules
from detailflow_jax.inference.checks import ArrayLike, as_array, check_whole
from detailflow_jax.inference.editing import edit as edit
from detailflow_jax.inference.editing import upscale as upscale
from detailflow_jax.inference.editing import vary as vary
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.hub import HubError as HubError
from detailflow_jax.inference.models import VAE, FlowAR, Generator, Model, Tokenizer, scans
from detailflow_jax.inference.models import LatentPosterior as LatentPosterior
from detailflow_jax.inference.pairs import check_pair as check_pair
from detailflow_jax.ops import images as pixels

Path = str | os.PathLike[str]


def load_tokenizer(
    path: Path,
    *,
    weights: str | None = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> Tokenizer:
    """Loads a tokenizer from a run of this project or from a published checkpoint.

    Args:
      path: the workdir of a run; or a published folder or file (.pt, .pth, .ckpt, .bin,
        .safetensors, shards), local or gs://; or `hf:OWNER/NAME[@REVISION][/FILE]`.
      weights: "model" or "ema". Default for a run: the average, if it keeps one. Default for a
        published checkpoint: "ema" for generators and FlowAR, "model" for others. If a file holds
        only the other set, that one is read with a warning.
      step: which checkpoint of a run; default the newest complete one.
      allow_missing: initialise parameters for which a published file holds no tensor.
      allow_unused: ignore tensors of a published file that belong to no parameter.
      **overrides: fields of the network's configuration that shapes cannot tell:
        `encoder_num_heads`, `decoder_num_heads` (a generator's `num_heads`), `group_size`,
        `causal_num`, `image_size` (a generator's `num_tokens`), or any other field.

    Raises:
      ConfigError, CheckpointError: nothing to load there, another kind of network, or sizes that
        contradict each other.
      ValueError: an unknown override or value of `weights`.
    """
    return _load(Tokenizer, path, weights, step, allow_missing, allow_unused, **overrides)


def load(path: Path, **options: Any) -> Model:
    """Loads any model that `load_tokenizer` and its kin load: which one, its files tell.

    `hf:OWNER/NAME` may be what `Model.push_to_hub` made. For the options see `load_tokenizer`.
    """
    return _load(None, path, **options)


def load_generator(path: Path, **options: Any) -> Generator:
    """Loads a generator from a run or a published checkpoint; see `load_tokenizer`."""
    return _load(Generator, path, **options)


def load_vae(path: Path, **options: Any) -> VAE:
    """Loads an autoencoder from a run or a published checkpoint; see `load_tokenizer`.

    Files may be of the LDM family, also a whole latent-diffusion checkpoint, or diffusers'
    `AutoencoderKL` and `AutoencoderDC`: a folder, or `hf:OWNER/NAME/vae` of a pipeline.

    Shapes cannot tell `scale_factor` (default without a configuration: that of KL-16, or 0.18215
    with 4 latent channels), `shift_factor` and `norm_groups`.
    """
    return _load(VAE, path, **options)


def load_flowar(path: Path, **options: Any) -> FlowAR:
    """Loads a FlowAR model from a run or a published checkpoint; see `load_tokenizer`.

    Its tensors cannot tell `scales` other than 1, 2, 4, ..., and `buffer_size`.
    """
    return _load(FlowAR, path, **options)


def _load(
    model: type[Model] | None,
    path: Path,
    weights: Any = None,
    step: int | None = None,
    allow_missing: bool = False,
    allow_unused: bool = False,
    **overrides: Any,
) -> Any:
    if step is not None:
        step = check_whole("step", step, 0)
    found = loading.load(
        model.kind if model else None,
        path,
        weights=weights,
        step=step,
        scan=scans(),
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        overrides=overrides,
    )
    for notice in found.notices:
        logging.warning("%s", notice)
    model = model or {m.kind: m for m in (Tokenizer, Generator, VAE, FlowAR)}[found.kind]
    return model(found.config, found.params, found.source, found.encoded_by, found.class_names)


def to_uint8(images: ArrayLike) -> UInt8[np.ndarray, "*B H W C"]:
    """Images in [-1, 1], as models decode them, as pixels: clip(127.5 x + 128, 0, 255), truncated.

    This is the published rounding. Values outside of the range are clipped.

    Raises:
      InputError: NaN or infinity, which would become some colour; or no floating point images.
    """
    images = as_array("images", images)
    if images.ndim < 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images are {images.dtype} {images.shape}; expected floats in [-1, 1], [..., H, W, C]"
        )
    if not np.isfinite(images).all():
        raise InputError("images hold NaN or infinity: the model's weights are damaged")
    return np.asarray(pixels.to_uint8(images))


def save_pytorch(
    model: Model,
    path: Path,
    *,
    bare: bool = False,
    keys: Collection[str] = (),
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model in the published layout, which the published code loads with strict=True.

    Args:
      model: a loaded model.
      path: a folder to make (config.json, config.yaml, checkpoints/N.pt), or a file ending in
        .pt, .pth, .ckpt, .bin or .safetensors, with the two configurations beside it.
      bare: write a state dict without a key around it, as FlowAR's `eval.py` reads it.
      keys: what a PyTorch file holds besides "model": "ema" and "discriminator". Where the run or
        file that the model was loaded from keeps both, "ema" is the average and "model" the raw
        weights, else they are the same. "discriminator" is that of this run or file.
      overwrite: whether a checkpoint at `path` may be replaced.

    Returns:
      the path written.

    Raises:
      CheckpointError: something is at `path`, or PyTorch is missing for a PyTorch file.
    """
    done = export.export(
        model.kind,
        model.config,
        model.params,
        path,
        bare=bare,
        keys=keys,
        source=model.source,
        encoded_by=model.encoded_by,
        class_names=model.class_names,
        overwrite=overwrite,
    )
    for notice in done.notices:
        logging.warning("%s: %s", done.path, notice)
    return done.path


def save_diffusers(model: Model, path: Path, *, overwrite: bool = False) -> pathlib.Path:
    """Writes an autoencoder as a folder that diffusers' `from_pretrained` loads.

    Args:
      model: a loaded autoencoder.
      path: a folder to make: config.json and diffusion_pytorch_model.safetensors.
      overwrite: whether such a folder at `path` may be replaced.

    Returns:
      the path written.

    Raises:
      CheckpointError: another network, or something is at `path`.
    """
    return diffusers.write(model.kind, model.config, model.params, path, overwrite=overwrite)
