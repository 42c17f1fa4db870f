"""Latents of a whole data set: the moments of an autoencoder's posterior, one record per image.

Shapes: h x w latent positions; C channels; the last axis of moments is (mean, logvar), unscaled.
The first axis holds the image and its mirror.
"""

import dataclasses

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

    what = "latents"
    needed = frozenset(_NEEDED)

    def __post_init__(self):
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))  # JSON has lists.
        super().__post_init__()
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ConfigError(f"LatentLayout.latent_shape={self.latent_shape}: expected (h, w, C)")
        if self.dtype not in DTYPES:
            raise ConfigError(f"LatentLayout.dtype={self.dtype!r}: expected {' or '.join(DTYPES)}")

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        height, width, channels = self.latent_shape
        return (VIEWS, height, width, 2 * channels)

    @property
    def record_dtype(self) -> np.dtype:
        """(index, label, moments [2, h, w, 2C])."""
        number = np.dtype(self.dtype).newbyteorder("<")
        fields = [("index", "<i8"), ("label", "<i4"), ("moments", number, self.moments_shape)]
        return np.dtype(fields)

    def encode(self, index: int, label: int, value: np.ndarray) -> bytes:
        if value.shape != self.moments_shape or value.dtype != np.float32:
            raise ValueError(
                f"moments of {index}: {value.dtype} {value.shape}, not float32 {self.moments_shape}"
            )
        with np.errstate(over="ignore"):  # told below
            record = np.array((index, label, value), self.record_dtype)
        if not np.isfinite(record["moments"]).all():
            why = (
                "NaN or infinite" if not np.isfinite(value).all() else f"too large for {self.dtype}"
            )
            raise ConfigError(f"moments of {index} are {why}")
        return record.tobytes()

    def decode(self, record: np.void) -> dict[str, np.ndarray]:
        return {"moments": record["moments"].astype(np.float32)}


class LatentSource(ShardSource):
    """Random access to a finished folder of latents; `source[i]` has "moments", see `LatentLayout`.

    `manifest` has `scale_factor` and `shift_factor`; they have not been applied to the moments.
    """

    layout_class = LatentLayout
