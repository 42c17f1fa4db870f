"""Encodes a data set once: the autoencoder's posterior of every image and of its mirror.

    python -m detailflow_jax.extract_latents --vae runs/vae --out runs/latents --source digits

Means and log-variances are stored, not samples: training draws a new sample each time it meets an
image, as it does when it encodes images itself. Killed at any moment, the same command goes on with
the missing shards and ends with the same bytes.
"""

import argparse
import functools
from collections.abc import Sequence

import numpy as np

from detailflow_jax import data
from detailflow_jax.convert.load import is_workdir
from detailflow_jax.data.latents import DTYPES
from detailflow_jax.inference import api, extraction, programs
from detailflow_jax.inference.batching import in_batches
from detailflow_jax.inference.errors import InputError
from detailflow_jax.runtime.command import program_name
from detailflow_jax.runtime.config import read_config

PUBLISHED_IMAGE_SIZE = 256
CROPS = ("center", "none")


def extract(
    vae: "api.VAE",
    source: data.Source,
    out: str,
    *,
    image_size: int = PUBLISHED_IMAGE_SIZE,
    crop: str = "center",
    dtype: str = "float32",
    shard_size: int = 4096,
    batch_size: int = 32,
) -> dict:
    """Writes the moments of a source to the folder `out`; resumes what is there.

    Args:
      vae: a loaded autoencoder.
      source: of images.
      out: folder, made if missing.
      image_size: R, side of the views in pixels; a multiple of the stride.
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
    if crop not in CROPS:
        raise InputError(f"crop={crop!r}; expected {' or '.join(CROPS)}")
    if image_size < 1 or image_size % c.stride:
        raise InputError(
            f"image_size={image_size} is no positive multiple of the stride {c.stride} of "
            f"{vae.source}"
        )
    side = image_size // c.stride
    layout = data.LatentLayout(len(source), shard_size, (side, side, c.latent_channels), dtype)
    definition = {
        "source": source.fingerprint,
        "vae": vae.fingerprint,
        "encoded_by": vae.encoder_fingerprint,
        "scale_factor": c.scale_factor,
        "shift_factor": c.shift_factor,
        "class_names": list(source.class_names),
        "num_classes": source.num_classes,
        "image_size": image_size,
        "crop": crop,
    }
    images = max(1, batch_size // 2)

    def encode(views: np.ndarray, positions: np.ndarray) -> np.ndarray:
        del positions  # nothing is drawn
        both = np.stack([views[:, 0], views[:, 0, :, ::-1]], axis=1)
        program = functools.partial(programs.encode_moments, vae.network, vae.params)
        rows = both.reshape(-1, *both.shape[2:])
        moments = in_batches(program, 2 * images, rows, mesh=vae.mesh, whole=True)
        return moments.reshape(len(views), 2, *moments.shape[1:])

    return extraction.extract(
        encode,
        source,
        out,
        layout,
        definition,
        image_size=image_size,
        crops=crop,
        batch_size=images,
    )


def trained_size(path: str) -> int:
    """The side of the images that a run was trained on; the published one for other checkpoints."""
    if not is_workdir(path):
        return PUBLISHED_IMAGE_SIZE
    trained = read_config(path).get("data", {})  # absent from a converted checkpoint
    return trained.get("image_size", PUBLISHED_IMAGE_SIZE)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("extract-latents"),
        description="Encode a data set into latent shards for FlowAR: the moments of each image "
        "and of its mirror. Run the same command again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--vae", required=True, help="what df.load_vae takes: a workdir, kl16.ckpt, ...")
    extraction.add_arguments(parser)
    add(
        "--image_size",
        type=int,
        help=f"side of the views; default: as the run was trained, else {PUBLISHED_IMAGE_SIZE}",
    )
    add("--crop", default="center", choices=CROPS, help="view of each image")
    add("--dtype", default="float32", choices=DTYPES, help="of the stored moments")
    add("--batch_size", type=int, default=32, help="views per call of the compiled program")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parse_arguments(argv)

    def run(source: data.Source) -> dict:
        return extract(
            api.load_vae(args.vae),
            source,
            args.out,
            image_size=args.image_size or trained_size(args.vae),
            crop=args.crop,
            dtype=args.dtype,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
        )

    return extraction.run_command(args, run, "and their mirrors")
