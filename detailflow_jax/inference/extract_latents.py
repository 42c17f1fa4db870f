"""Encodes a data set once: the autoencoder's posterior of every image and of its mirror.

    detailflow extract --vae runs/vae --out runs/latents --source digits

Means and log-variances are stored, not samples: training draws a new sample each time it reads an
image, as it does when it encodes images itself.
"""

from typing import Any

import numpy as np

from detailflow_jax import data
from detailflow_jax.convert.load import is_workdir
from detailflow_jax.data.latents import DTYPES, VIEWS
from detailflow_jax.inference import api, extraction, programs
from detailflow_jax.inference.checks import check_whole
from detailflow_jax.inference.errors import InputError
from detailflow_jax.runtime.config import read_config

PUBLISHED = 256
CROPS = ("center", "none")


def extract(
    vae: "api.VAE",
    source: data.Source,
    out: str,
    *,
    image_size: int | None = None,
    crop: str = "center",
    dtype: str = "float32",
    shard_size: int = 4096,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Writes the moments of a source to the folder `out`; resumes what is there.

    Args:
      vae: a loaded autoencoder.
      source: of images.
      out: folder, made if missing.
      image_size: side of the views in pixels, a multiple of the stride. Default: that of the images
        that the autoencoder was trained on; 256 for a published checkpoint.
      crop: "center", or "none" to resize whole images (`data.encoding_crops`).
      dtype: of the stored numbers, "float32" or "float16".
      shard_size: images per shard.
      batch_size: views per call of the compiled program; an image has two.

    Returns:
      the manifest, which holds the autoencoder's fingerprint, scale and shift.

    Raises:
      InputError: the stride does not divide the size, or an unknown crop.
      ConfigError: the folder holds another extraction; the differing fields are named.
    """
    c = vae.config
    if image_size is None:
        image_size = trained_size(vae.source)
    if crop not in CROPS:
        raise InputError(f"crop={crop!r}; expected {' or '.join(CROPS)}")
    image_size = check_whole("image_size", image_size)
    shard_size = check_whole("shard_size", shard_size, 1)
    batch_size = check_whole("batch_size", batch_size, 1)
    if image_size < 1 or image_size % c.stride:
        raise InputError(
            f"image_size={image_size} is no positive multiple of the stride {c.stride} of "
            f"{vae.source}"
        )
    shape = (image_size // c.stride, image_size // c.stride, c.latent_channels)

    def program(views, positions, numbers):
        del positions, numbers  # nothing is drawn
        return programs.encode_moments(vae.network, vae.params, views)

    plan = extraction.Extraction(
        layout=data.LatentLayout(len(source), shard_size, shape, dtype),
        model=vae,
        settings={
            # Lists where there is one per channel, as the manifest has them.
            "scale_factor": np.asarray(c.scale_factor).tolist(),
            "shift_factor": np.asarray(c.shift_factor).tolist(),
            "crop": crop,
        },
        program=program,
        image_size=image_size,
        crops=crop,
        num_views=VIEWS,
        batch_size=batch_size,
        mirrored=True,
    )
    return extraction.extract(plan, source, out)


def trained_size(path: str) -> int:
    """The side of the images that a run was trained on; 256 for other checkpoints."""
    if not is_workdir(path):
        return PUBLISHED
    trained = read_config(path).get("data", {})  # absent from a converted checkpoint
    return trained.get("image_size", PUBLISHED)


COMMAND = extraction.Command(
    name="extract-latents",
    description="Encode a data set into latent shards for FlowAR: the moments of each image and of "
    "its mirror.",
    network="vae",
    takes="what df.load_vae takes: a workdir, kl16.ckpt, ...",
    load=api.load_vae,
    extract=extract,
    options={
        "image_size": "side of the views in pixels; default that of the images that it was trained "
        f"on, {PUBLISHED} of a published file",
        "crop": "view of each image",
        "dtype": "of the stored moments",
        "batch_size": "views per call of the compiled program",
    },
    choices={"crop": CROPS, "dtype": DTYPES},
    stored=lambda settings: "and their mirrors",
)
main = COMMAND.main
