"""Encodes a data set once: each crop of each image as the triplet that the generator learns from.

    detailflow extract --tokenizer runs/tok --out runs/codes --source digits

The triplets are those of the paper's self-correction training. The noise of a crop depends on the
seed, the position of its image and the number of the crop. The codebook lies beside them, since a
flow head learns the vectors of the codes (`models/flow_generator.py`).

Shapes: B crops, R their side, N tokens.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from detailflow_jax import data
from detailflow_jax.inference import api, extraction, noise
from detailflow_jax.inference.checks import check_seed, check_whole
from detailflow_jax.models.sampler import sample_keys
from detailflow_jax.models.tokenizer import Tokenizer
from detailflow_jax.ops import Array


@functools.partial(jax.jit, static_argnames=("network", "seed", "top"))
def encode_crops(
    network: Tokenizer,
    params: Any,
    views: UInt8[Array, "B R R 3"],
    positions: Int[Array, " B"],
    crops: Int[Array, " B"],
    *,
    seed: int,
    top: int,
) -> Int[Array, "B N 3"]:
    """Triplets of crops, by the positions of their images and their own numbers."""
    keys = jax.vmap(jax.random.fold_in)(sample_keys(seed, positions), crops)
    return noise.encode_triplets(network, params, views, keys, top=top)


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
) -> dict[str, Any]:
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
    seed, noise_top = check_seed(seed), check_whole("noise_top", noise_top, 1)
    shard_size = check_whole("shard_size", shard_size, 1)
    batch_size = check_whole("batch_size", batch_size, 1)
    c, count = tokenizer.config, data.ENCODING_CROPS[crops]
    program = functools.partial(
        encode_crops, tokenizer.network, tokenizer.params, seed=seed, top=noise_top
    )
    plan = extraction.Extraction(
        layout=data.CodeLayout(len(source), shard_size, count, c.num_tokens, c.codebook_size),
        model=tokenizer,
        settings={
            "group_size": c.group_size,
            "causal_num": c.causal,
            "crops": crops,
            "seed": seed,
            "noise_top": noise_top,
        },
        program=program,
        image_size=c.image_size,
        crops=crops,
        num_views=count,
        batch_size=batch_size,
        files={data.CODEBOOK: data.codebook_file(np.asarray(tokenizer.params["codebook"]))},
    )
    return extraction.extract(plan, source, out)


COMMAND = extraction.Command(
    name="extract-codes",
    description="Encode a data set into code shards for the generator.",
    network="tokenizer",
    takes="what df.load_tokenizer takes, such as a workdir",
    load=api.load_tokenizer,
    extract=extract,
    options={
        "crops": "views of each image",
        "seed": "of the noise",
        "noise_top": "nearest codes that noise picks from",
        "batch_size": "crops per call of the compiled program",
    },
    choices={"crops": sorted(data.ENCODING_CROPS)},
    stored=lambda settings: f"x {data.ENCODING_CROPS[settings['crops']]} crops",
)
main = COMMAND.main
