"""What all models share: parameters on the devices, batches, and samples of labels.

The letters of shapes are those of the package.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Int32, Shaped

from detailflow_jax.convert.fingerprint import encoder_fingerprint, fingerprint
from detailflow_jax.convert.registry import NETWORKS, with_scan
from detailflow_jax.inference import hub
from detailflow_jax.inference.batching import in_batches
from detailflow_jax.inference.checks import (
    ArrayLike,
    as_array,
    check_labels,
    check_seed,
    check_whole,
)
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.sampling import Sampling
from detailflow_jax.models import layers
from detailflow_jax.runtime import sharding


def scans() -> bool:
    """Whether layers are scanned on this backend."""
    # A scan slices stacked weights at every layer, which costs time on a CPU but not on others.
    return jax.default_backend() != "cpu"


class Model:
    """A network's configuration and parameters, laid out for this machine's backend.

    Attributes:
      kind: key of the network in the registry.
      config: of the network.
      network: the Linen module.
      params: its parameters, on the devices.
      source: where they come from.
      encoded_by: fingerprint of the encoder whose codes or latents it was trained on; "" where that
        is not known.
      class_names: in the order of the labels; empty where they are not known.
      mesh: what splits batches; None with one device.
    """

    kind: str
    config: Any
    network: Any

    def __init__(
        self,
        config: Any,
        params: Mapping[str, Any],
        source: str = "memory",
        encoded_by: str = "",
        class_names: tuple[str, ...] = (),
    ):
        """Takes parameters in the scanned or the unrolled layout."""
        scan = scans()
        self.config = with_scan(config, scan)
        params = (layers.stack_layers if scan else layers.unstack_layers)(params)
        # Unlike `jnp.asarray`, this uses suitable host memory without a copy.
        self.params = jax.device_put(params)
        self.network = NETWORKS[self.kind].module(self.config)
        self.source, self.encoded_by, self.class_names = source, encoded_by, class_names
        self.mesh: Mesh | None = None
        if jax.local_device_count() > 1:
            self.spread(sharding.make_mesh({}, jax.local_devices()))

    def spread(self, mesh: Mesh) -> None:
        """Copies the parameters to every device of a mesh, which splits batches from now on."""
        self.mesh = mesh
        self.params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))

    def run(
        self, program: Callable[..., Any], batch_size: int, *rows: Shaped[np.ndarray, "_ ..."]
    ) -> Shaped[np.ndarray, "B ..."]:
        """`program(network, params, *rows)` of all rows, in batches."""
        function = functools.partial(program, self.network, self.params)
        return in_batches(function, batch_size, *rows, mesh=self.mesh)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters, the same in either layout and on any machine."""
        return fingerprint(self.params)

    @functools.cached_property
    def encoder_fingerprint(self) -> str:
        """A hash of the parameters that decide the codes or latents of an image."""
        return encoder_fingerprint(self.kind, self.params)

    def push_to_hub(
        self,
        repo: str,
        *,
        workdir: str | None = None,
        results: Sequence[str] = (),
        picture: str | None = None,
        licence: str | None = None,
        pytorch: bool = False,
        private: bool = False,
        revision: str | None = None,
        message: str = "",
    ) -> str:
        """Uploads the model and a card to the Hugging Face hub; `df.load("hf:REPO")` loads it.

        Args:
          repo: "owner/name", made if it is not there.
          workdir: of the run that the card takes scores and a picture from; default the one that
            the model was loaded from.
          results: results.json of evaluations, whose figures the card has.
          picture: a PNG for the card; default the newest one of the run.
          licence: for the card, such as "apache-2.0".
          pytorch: also write the published PyTorch layout, in `pytorch/` (DC-AE: `diffusers/`).
          private: make the repository private, if it is made.
          revision: branch to commit to; default main.
          message: of the commit.

        Returns:
          the address of the commit.

        Raises:
          ConfigError: no such name, or a file for the card that cannot be used.
          HubError: the hub did not take it.
        """
        return hub.push(
            self,
            repo,
            workdir=workdir,
            results=results,
            picture=picture,
            licence=licence,
            pytorch=pytorch,
            private=private,
            revision=revision,
            message=message,
        )

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<{type(self).__name__} {count / 1e6:.1f}M parameters from {self.source}>"


def sample_indices(first: Any, count: int) -> Int32[np.ndarray, " B"]:
    """The indices of samples from `first` on; raises InputError unless they are int32."""
    return check_whole("first_index", first, 0, 2**31 - count) + np.arange(count, dtype=np.int32)


class Sampler(Model):
    """A network that makes samples of labels."""

    def _sample(
        self,
        sampling: Sampling,
        labels: Int[np.ndarray, " B"],
        seed: int,
        first_index: int,
        batch_size: int,
        **given: Any,
    ) -> Shaped[np.ndarray, "B ..."]:
        """Samples; `given` is what the sampling takes besides, as trees of arrays of B rows."""
        parts, tree = jax.tree.flatten(given)
        seed, indices = check_seed(seed), sample_indices(first_index, len(labels))

        def run(network, params, labels, indices, *parts):
            return sampling(params, labels, seed, indices, **jax.tree.unflatten(tree, parts))

        rows = labels.astype(np.int32), indices, *parts
        return self.run(run, batch_size, *rows)

    def _classes(self, labels: ArrayLike | None, rows: int) -> Int[np.ndarray, " B"]:
        """The labels as the network knows them; None is the null class, `rows` times."""
        null = self.config.num_classes
        if labels is None:
            if not rows:
                raise InputError("labels are missing: only what is continued or kept needs none")
            return np.full(rows, null)
        labels = as_array("labels", labels)
        check_labels(labels, null)
        # Trained without classes: only the null class is known.
        return np.full_like(labels, null) if self.config.class_dropout == 1 else labels
