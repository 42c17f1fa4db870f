"""Encodes a data set once: every crop of every image as the triplet the generator learns from.

    python -m detailflow_jax.extract_codes --tokenizer runs/tok --out runs/codes --source digits

Kill it at any moment and run the same command again: it goes on with the shards that are missing
and ends with the same bytes, because every random number comes from the seed and the position of
the image and crop (the paper's self-correction training).
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax import data
from detailflow_jax.inference import api, extraction
from detailflow_jax.models.tokenizer import Tokenizer
from detailflow_jax.ops import correction
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import distributed
from detailflow_jax.runtime.checkpoint import CheckpointError
from detailflow_jax.runtime.command import program_name
from detailflow_jax.runtime.errors import UserError


@functools.partial(jax.jit, static_argnums=(0, 4))
def encode_triplets(network: Tokenizer, params: Any, crops: jax.Array, keys: jax.Array, top: int):
    """Triplets (clean, input, label) of a batch of crops, each with noise of its own.

    Args:
      network: the tokenizer.
      params: its parameters.
      crops: uint8 [B, R, R, 3].
      keys: one PRNG key a crop, [B].
      top: a perturbed token becomes one of its so many nearest codes.

    Returns:
      int32 [B, N, 3].
    """
    c = network.config
    whole = jnp.int32(c.num_tokens)

    def draw(key):
        position_key, choice_key = jax.random.split(key)
        span = correction.draw_span(
            position_key,
            1,
            whole,
            num_tokens=c.num_tokens,
            group_size=c.group_size,
            causal_num=c.causal,
        )
        choice = jax.random.randint(choice_key, (c.num_tokens,), 0, min(top, c.codebook_size))
        return jax.tree.map(lambda x: x[0], span), choice

    span, choice = jax.vmap(draw)(keys)
    pair = network.apply(
        {"params": params}, pixels.to_float(crops), span, choice, method="encode_pair"
    )
    return pair.triplet


def crop_keys(seed: int, positions: np.ndarray, crops: np.ndarray) -> jax.Array:
    """One key a crop from the seed, the image's position and the crop's number: keys [B]."""
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
      noise_top: a perturbed token becomes one of its so many nearest codes.
      shard_size: images a shard.
      batch_size: crops a call of the compiled program.

    Returns:
      the manifest.

    Raises:
      ValueError: the folder holds another extraction; the differing fields are named.
    """
    c = tokenizer.config
    per_image = data.ENCODING_CROPS[crops]
    layout = data.CodeLayout(len(source), shard_size, per_image, c.num_tokens, c.codebook_size)
    definition = {
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "class_names": list(source.class_names),
        "num_classes": source.num_classes,
        "image_size": c.image_size,
        "group_size": c.group_size,
        "causal_num": c.causal,
        "crops": crops,
        "seed": seed,
        "noise_top": noise_top,
    }

    def encode(views: np.ndarray, positions: np.ndarray) -> np.ndarray:
        which = np.tile(np.arange(per_image), len(views))
        keys = crop_keys(seed, np.repeat(positions, per_image), which)
        flat, keys = tokenizer.place((views.reshape(-1, *views.shape[2:]), keys))
        codes = encode_triplets(tokenizer.network, tokenizer.params, flat, keys, noise_top)
        return np.asarray(codes).reshape(len(views), per_image, *codes.shape[1:])

    return extraction.extract(
        encode,
        source,
        out,
        layout,
        definition,
        image_size=c.image_size,
        crops=crops,
        batch_size=max(1, batch_size // per_image),
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
    add("--batch_size", type=int, default=64, help="crops a call of the compiled program")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 with one line that says what is wrong."""
    args = parse_arguments(argv)
    try:
        distributed.start(args.coordinator_address, args.num_processes, args.process_id)
        tokenizer = api.load_tokenizer(args.tokenizer)
        source = data.make_source(args.source, args.split, args.data_dir)
        manifest = extract(
            tokenizer,
            source,
            args.out,
            crops=args.crops,
            seed=args.seed,
            noise_top=args.noise_top,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
        )
    except (UserError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if jax.process_index() > 0:
        return 0
    print(
        f"{manifest['num_records']} images x {data.ENCODING_CROPS[args.crops]} crops in "
        f"{len(manifest['shards'])} shards in {args.out}; {len(manifest['unreadable'])} unreadable"
    )
    return 0
