"""Images, codes and latents for training: sources, crops, deterministic batches, shards.

source.py       what every source of labelled images offers
sources.py      where they come from: a package, a folder, TFDS
shipped.py      images that packages ship: two sets of digits, photographs
prepare.py      preparing a TFDS dataset, a command
imagenet.py     ImageNet from its tars to a TFDS dataset
folders.py      which files of a folder are images, and of which class
images.py       image files to RGB pictures
transforms.py   crops for training and for encoding
pipeline.py     batches as a pure function of (seed, step), with Grain
workers.py      processes that make them
shards.py       writes codes or latents of a data set; resumes
shard_source.py reads them
classes.py      the class names of images and of models, a command
codes.py        records of codes, for the generator
latents.py      records of latents, for FlowAR
"""

from detailflow_jax.data.codes import CODEBOOK, CodeLayout, CodeSource, codebook_file
from detailflow_jax.data.errors import UnreadableImage, printable
from detailflow_jax.data.latents import LatentLayout, LatentSource
from detailflow_jax.data.pipeline import iterate_crops, make_iterator
from detailflow_jax.data.shards import (
    ShardLayout,
    open_extraction,
    pending_shards,
    write_manifest,
    write_shard,
)
from detailflow_jax.data.sources import Source, make_source
from detailflow_jax.data.transforms import (
    ENCODING_CROPS,
    TRAINING_CROPS,
    encoding_crops,
    training_crop,
)

__all__ = [
    "CODEBOOK",
    "ENCODING_CROPS",
    "TRAINING_CROPS",
    "CodeLayout",
    "CodeSource",
    "LatentLayout",
    "LatentSource",
    "ShardLayout",
    "Source",
    "UnreadableImage",
    "codebook_file",
    "encoding_crops",
    "iterate_crops",
    "make_iterator",
    "make_source",
    "open_extraction",
    "pending_shards",
    "printable",
    "training_crop",
    "write_manifest",
    "write_shard",
]
