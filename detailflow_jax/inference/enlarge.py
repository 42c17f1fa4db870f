"""Images decoded from a prefix of their tokens, at full size."""

from typing import Any

import numpy as np

from detailflow_jax.ops import interpolation


def decode_enlarged(
    tokenizer: Any, codes: np.ndarray, count: int, batch_size: int = 64
) -> np.ndarray:
    """The first `count` codes decoded, then enlarged to full size: float32 [B, R, R, 3]."""
    images = tokenizer.decode(codes[:, :count], batch_size=batch_size)
    return np.asarray(interpolation.enlarge(images, tokenizer.config.image_size))
