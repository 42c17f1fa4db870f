"""Encodes a data set once: each crop of each image as the triplet that the generator learns from.

    python -m detailflow_jax.extract_codes --tokenizer runs/tok --out runs/codes --source digits

Killed at any moment, the same command goes on with the missing shards and ends with the same bytes:
every random number comes from the seed and the position of the image and crop. The triplets are
those of the paper's self-correction training.
"""

import argparse
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from detailflow_jax import data
from detailflow_jax.inference import api, extraction, noise
from detailflow_jax.inference.batching import in_batches
from detailflow_jax.runtime.command import program_name


@functools.partial(jax.jit, static_argnames=("network", "seed", "top"))
def encode_crops(network, params, views, positions, crops, *, seed: int, top: int):
    """Triplets int32 [B, N, 3] of views uint8 [B, R, R, 3]; see `noise.encode_triplets`.

    The noise of a view depends on the seed, the position of its image and the number of its crop.
    """
    keys = crop_keys(seed, positions, crops)
    return noise.encode_triplets(network, params, views, keys, top=top)


def crop_keys(
    seed: int, positions: Int[Array | np.ndarray, " B"], crops: Int[Array | np.ndarray, " B"]
) -> Key[Array, " B"]:
    """One PRNG key per crop, from the seed, the image's position and the crop's number."""
    fold = jax.vmap(jax.random.fold_in, (0, 0))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), positions)
    return fold(keys, crops)


def extract(
    tokenizer: "api.Tokenizer",
    source: data.Source,
    out: str,
    *,
    crops: str = "ten",
    seed: int = 0,
    noise_top: int = 50,
    shard_size: int = 4096,
    batch_size: int = 64,
) -> dict:
    """Writes the codes of a source to the folder `out`; resumes what is there.

    Args:
      tokenizer: a loaded tokenizer.
      source: of images.
      out: folder, made if missing.
      crops: views of each image: "ten", "five", "center" or "none" (`data.encoding_crops`).
      seed: of the noise.
      noise_top: a perturbed token becomes one of its `noise_top` nearest codes.
      shard_size: images per shard.
      batch_size: crops per call of the compiled program.

    Returns:
      the manifest.

    Raises:
      ConfigError: the folder holds another extraction; the differing fields are named.
    """
    c = tokenizer.config
    per_image = data.ENCODING_CROPS[crops]
    layout = data.CodeLayout(len(source), shard_size, per_image, c.num_tokens, c.codebook_size)
    definition = {
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "encoded_by": tokenizer.encoder_fingerprint,
        "class_names": list(source.class_names),
        "num_classes": source.num_classes,
        "image_size": c.image_size,
        "group_size": c.group_size,
        "causal_num": c.causal,
        "crops": crops,
        "seed": seed,
        "noise_top": noise_top,
    }
    images = max(1, batch_size // per_image)

    def encode(views: np.ndarray, positions: np.ndarray) -> np.ndarray:
        rows = (
            views.reshape(-1, *views.shape[2:]),
            np.repeat(positions, per_image).astype(np.int32),
            np.tile(np.arange(per_image, dtype=np.int32), len(views)),
        )
        program = functools.partial(
            encode_crops, tokenizer.network, tokenizer.params, seed=seed, top=noise_top
        )
        codes = in_batches(program, images * per_image, *rows, mesh=tokenizer.mesh, whole=True)
        return codes.reshape(len(views), per_image, *codes.shape[1:])

    return extraction.extract(
        encode,
        source,
        out,
        layout,
        definition,
        image_size=c.image_size,
        crops=crops,
        batch_size=images,
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("extract-codes"),
        description="Encode a data set into code shards for the generator. Run the same command "
        "again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="what df.load_tokenizer takes, such as a workdir")
    extraction.add_arguments(parser)
    add("--crops", default="ten", choices=sorted(data.ENCODING_CROPS), help="views of each image")
    add("--seed", type=int, default=0, help="of the noise")
    add("--noise_top", type=int, default=50, help="nearest codes that noise picks from")
    add("--batch_size", type=int, default=64, help="crops per call of the compiled program")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parse_arguments(argv)

    def run(source: data.Source) -> dict:
        return extract(
            api.load_tokenizer(args.tokenizer),
            source,
            args.out,
            crops=args.crops,
            seed=args.seed,
            noise_top=args.noise_top,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
        )

    return extraction.run_command(args, run, f"x {data.ENCODING_CROPS[args.crops]} crops")
