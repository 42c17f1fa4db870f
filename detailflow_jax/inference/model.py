"""What every loaded model is: a configuration and parameters laid out for this machine.

Shapes: B images or samples.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detailflow_jax.convert import published
from detailflow_jax.models import layers
from detailflow_jax.runtime import sharding


def scans() -> bool:
    """Whether layers are scanned here."""
    # A scan slices stacked weights at every layer, which a CPU pays for and others do not.
    return jax.default_backend() != "cpu"


class Model:
    """A network's configuration and parameters, laid out for this machine's backend."""

    kind: str

    def __init__(self, network: Callable, config: Any, params: Mapping[str, Any], source: str):
        """Args: the Linen module class, its config, scanned or unrolled parameters, the origin."""
        scan = scans()
        self.config = published.with_scan(config, scan)
        params = (layers.stack_layers if scan else layers.unstack_layers)(params)
        # Unlike `jnp.asarray`, this takes suitable host memory over without a copy.
        self.params = jax.device_put(params)
        self.network = network(self.config)
        self.source = source
        self.mesh: Mesh | None = None
        if jax.local_device_count() > 1:
            self.spread(sharding.make_mesh({}, jax.local_devices()))

    def spread(self, mesh: Mesh) -> None:
        """Copies the parameters to every device of a mesh, which splits batches from now on."""
        self.mesh = mesh
        self.params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))

    def place(self, rows: Any) -> Any:
        """Arrays [B, ...] split over the devices, where they divide B."""
        if self.mesh is None or len(jax.tree.leaves(rows)[0]) % self.mesh.size:
            return rows
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec(sharding.BATCH)))

    def in_batches(self, function: Callable, batch_size: int, rows: np.ndarray) -> np.ndarray:
        """`function` over equal batches of rows, the last one padded: one compile, any length.

        Several devices share each batch, which is rounded up so that they can.
        """
        if not len(rows):
            return np.asarray(function(rows))
        devices = 1 if self.mesh is None else self.mesh.size
        size = -(-min(batch_size, len(rows)) // devices) * devices
        padded = np.pad(rows, [(0, -len(rows) % size)] + [(0, 0)] * (rows.ndim - 1), "edge")
        with contextlib.nullcontext() if self.mesh is None else sharding.use(self.mesh):
            batches = (padded[i : i + size] for i in range(0, len(padded), size))
            parts = [function(self.place(batch)) for batch in batches]
        return np.concatenate([np.asarray(part) for part in parts])[: len(rows)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters, the same in either layout and on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        stacked = layers.stack_layers(self.params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf))
        return digest.hexdigest()

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<{type(self).__name__} {count / 1e6:.1f}M parameters from {self.source}>"


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError unless they are class numbers, at least one."""
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected integers [B], B > 0")
    wrong = sorted({int(x) for x in labels if not 0 <= x < num_classes})
    if wrong:
        raise ValueError(f"labels {wrong[:5]} are out of range, expected 0..{num_classes - 1}")
