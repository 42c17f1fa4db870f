"""How well a tokenizer reconstructs, by the number of tokens."""

from collections.abc import Sequence

import numpy as np

from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation


def decode_enlarged(tokenizer, codes: np.ndarray, count: int) -> np.ndarray:
    """The first `count` codes decoded, then enlarged to full size: float32 [B, R, R, 3]."""
    images = tokenizer.decode(codes[:, :count])
    return np.asarray(interpolation.enlarge(images, tokenizer.config.image_size))


def psnr_by_tokens(tokenizer, images: np.ndarray, counts: Sequence[int]) -> dict[int, float]:
    """Mean PSNR in dB of images uint8 [B, R, R, 3] decoded from the first n tokens, for each n.

    The decoded image is enlarged to full size by bicubic interpolation and held against the
    original, so a count is judged by what a viewer sees of it.
    """
    codes = tokenizer.encode(images)
    reference = pixels.to_float(np.asarray(images))
    return {
        n: float(np.mean(pixels.psnr(decode_enlarged(tokenizer, codes, n), reference)))
        for n in counts
    }
