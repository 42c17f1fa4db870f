"""Encodes a data set once: the autoencoder's posterior of every image and of its mirror.

    python -m detailflow_jax.extract_latents --vae runs/vae --out runs/latents --source digits

Stored are means and log-variances, not samples: training draws a new sample each time it meets an
image, as it does when it encodes images itself (facts FlowAR 7). Kill it at any moment and run the
same command again: it goes on with the shards that are missing and ends with the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import numpy as np

from detailflow_jax import data
from detailflow_jax.convert.load import is_workdir
from detailflow_jax.data.latents import DTYPES
from detailflow_jax.inference import api, extraction
from detailflow_jax.runtime import distributed
from detailflow_jax.runtime.checkpoint import CheckpointError
from detailflow_jax.runtime.command import program_name
from detailflow_jax.runtime.config import read_config
from detailflow_jax.runtime.errors import UserError

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
      shard_size: images a shard.
      batch_size: views a call of the compiled program; an image has two.

    Returns:
      the manifest, which holds the autoencoder's fingerprint, scale and shift.

    Raises:
      ValueError: a size that the stride does not divide, or a folder with another extraction, whose
        differing fields are named.
    """
    c = vae.config
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r}; expected {' or '.join(CROPS)}")
    if image_size < 1 or image_size % c.stride:
        raise ValueError(
            f"image_size={image_size} is no positive multiple of the stride {c.stride} of "
            f"{vae.source}"
        )
    side = image_size // c.stride
    layout = data.LatentLayout(len(source), shard_size, (side, side, c.latent_channels), dtype)
    definition = {
        "source": source.fingerprint,
        "vae": vae.fingerprint,
        "scale_factor": c.scale_factor,
        "shift_factor": c.shift_factor,
        "class_names": list(source.class_names),
        "num_classes": source.num_classes,
        "image_size": image_size,
        "crop": crop,
    }

    def encode(views: np.ndarray, positions: np.ndarray) -> np.ndarray:
        del positions  # nothing is drawn
        both = np.stack([views[:, 0], views[:, 0, :, ::-1]], axis=1)
        moments = np.asarray(vae.moments(both.reshape(-1, *both.shape[2:])))
        return moments.reshape(len(views), 2, *moments.shape[1:])

    return extraction.extract(
        encode,
        source,
        out,
        layout,
        definition,
        image_size=image_size,
        crops=crop,
        batch_size=max(1, batch_size // 2),
    )


def trained_size(path: str) -> int:
    """The images' side that a run was trained at; of anything else, the published one."""
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
    add("--batch_size", type=int, default=32, help="views a call of the compiled program")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 with one line that says what is wrong."""
    args = parse_arguments(argv)
    try:
        distributed.start(args.coordinator_address, args.num_processes, args.process_id)
        vae = api.load_vae(args.vae)
        source = data.make_source(args.source, args.split, args.data_dir)
        manifest = extract(
            vae,
            source,
            args.out,
            image_size=args.image_size or trained_size(args.vae),
            crop=args.crop,
            dtype=args.dtype,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
        )
    except (UserError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shape = " x ".join(map(str, manifest["latent_shape"]))
    if jax.process_index() > 0:
        return 0
    print(
        f"{manifest['num_records']} images and their mirrors, latents {shape}, in "
        f"{len(manifest['shards'])} shards in {args.out}; {len(manifest['unreadable'])} unreadable"
    )
    return 0
