"""Latents of a whole data set: the moments of an autoencoder's posterior, one record per image.

Shapes: h x w latent positions; C channels; the last axis of moments is (mean, logvar), unscaled.
The first axis holds the image and its mirror.
"""

import dataclasses
import math

import numpy as np

from detailflow_jax.data.shard_source import ShardSource
from detailflow_jax.data.shards import ShardLayout
from detailflow_jax.runtime.errors import ConfigError

VIEWS = 2
"""The image and its mirror."""

DTYPES = ("float32", "float16")
_NEEDED = {"source", "vae", "scale_factor", "shift_factor"}
_NEEDED |= {"class_names", "num_classes", "image_size", "crop"}


@dataclasses.dataclass(frozen=True)
class LatentLayout(ShardLayout):
    """Records of moments [2, h, w, 2C]."""

    latent_shape: tuple[int, int, int]  # h, w, C
    dtype: str  # as stored

    what, field = "latents", "moments"
    needed = frozenset(_NEEDED)
    accepts = np.float32

    def __post_init__(self):
        shape = self.latent_shape
        sizes = isinstance(shape, list | tuple) and [type(n) is int and n > 0 for n in shape]
        if sizes != [True, True, True]:
            raise ConfigError(f"LatentLayout.latent_shape={shape!r:.99}: expected (h, w, C)")
        object.__setattr__(self, "latent_shape", tuple(shape))  # JSON has lists.
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ConfigError(f"LatentLayout.dtype={self.dtype!r}: expected {' or '.join(DTYPES)}")

    @property
    def value_dtype(self) -> np.dtype:
        """Moments [2, h, w, 2C]."""
        height, width, channels = self.latent_shape
        number = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype((number, (VIEWS, height, width, 2 * channels)))

    def check(self, index: int, value: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # Reported here.
            finite = np.isfinite(value.astype(self.dtype)).all()
        if not finite:
            too_large = f"too large for {self.dtype}"
            why = too_large if np.isfinite(value).all() else "NaN or infinite"
            raise ConfigError(f"moments of {index} are {why}")


class LatentSource(ShardSource):
    """Random access to a finished folder of latents; `source[i]` has "moments", see `LatentLayout`.

    `manifest` has `scale_factor` and `shift_factor`; they have not been applied to the moments.
    """

    layout_class, dtype = LatentLayout, np.float32

    @classmethod
    def read_manifest(cls, directory: str) -> dict:
        """Returns the manifest, with a scale above 0 and a shift; raises as `ShardSource`."""
        manifest = super().read_manifest(directory)
        channels = LatentLayout(1, 1, manifest["latent_shape"], manifest["dtype"]).latent_shape[2]
        for name, least in (("scale_factor", 0.0), ("shift_factor", -math.inf)):
            value = manifest[name]
            several = value if isinstance(value, list) else [value] * channels
            is_number = [type(x) in (int, float) and least < x < math.inf for x in several]
            if is_number != [True] * channels:
                raise ConfigError(
                    f"{directory}: {name} in manifest.json is {value!r:.99}, expected a number "
                    f"{'above 0 ' * (least == 0)}or {channels} of them"
                )
        return manifest
