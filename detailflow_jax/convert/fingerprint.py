"""Hashes of parameters, which tell one trained network from another of the same size."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.models import layers


def fingerprint(params: Mapping[str, Any]) -> str:
    """Returns a hash of parameters, the same in either layout and on any machine."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers.stack_layers(params)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def encoder_fingerprint(kind: str, params: Mapping[str, Any]) -> str:
    """Returns a hash of the parameters that decide the codes or latents of an image.

    It stays the same when the decoder alone is trained on.
    """
    parts = NETWORKS[kind].encoder
    return fingerprint({name: params[name] for name in parts if name in params})
