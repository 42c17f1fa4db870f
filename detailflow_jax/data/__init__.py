"""Images and codes for training: sources, crops, deterministic batches, code shards.

sources.py      where labelled images come from (digits, a folder, TFDS)
images.py       image files to RGB arrays
transforms.py   crops for training and for encoding
pipeline.py     batches as a pure function of (seed, step), with Grain
codes.py        writing the codes of a data set, restartably
code_source.py  reading them
"""

from detailflow_jax.data.code_source import CodeSource
from detailflow_jax.data.codes import (
    ShardLayout,
    open_extraction,
    pending_shards,
    write_manifest,
    write_shard,
)
from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.data.pipeline import iterate_crops, make_iterator
from detailflow_jax.data.sources import Source, make_source
from detailflow_jax.data.transforms import (
    ENCODING_CROPS,
    TRAINING_CROPS,
    encoding_crops,
    training_crop,
)

__all__ = [
    "ENCODING_CROPS",
    "TRAINING_CROPS",
    "CodeSource",
    "ShardLayout",
    "Source",
    "UnreadableImage",
    "encoding_crops",
    "iterate_crops",
    "make_iterator",
    "make_source",
    "open_extraction",
    "pending_shards",
    "training_crop",
    "write_manifest",
    "write_shard",
]
