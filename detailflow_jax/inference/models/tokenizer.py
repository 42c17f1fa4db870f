"""The tokenizer on arrays: images to codes and back.

The letters of shapes are those of the package.
"""

import numpy as np
from jaxtyping import Float32, Int32

from detailflow_jax.inference import programs
from detailflow_jax.inference.checks import (
    ArrayLike,
    as_array,
    as_images,
    check_codes,
    check_images,
    check_vectors,
    check_whole,
)
from detailflow_jax.inference.models.base import Model
from detailflow_jax.models.tokenizer import TokenizerConfig


class Tokenizer(Model):
    """Images to codes and back."""

    kind = "tokenizer"
    config: TokenizerConfig

    def encode(self, images: ArrayLike, *, batch_size: int = 64) -> Int32[np.ndarray, "B N"]:
        """Images -> codes.

        Args:
          images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the patch.
          batch_size: images per call of the compiled program.

        Raises:
          ValueError, TypeError: another shape or type.
        """
        images = as_images(images)
        check_images(images, 3, self.config.encoder.patch_size)
        return self.run(programs.encode, batch_size, images)

    def decode(
        self, codes: ArrayLike, size: int | None = None, *, batch_size: int = 64
    ) -> Float32[np.ndarray, "B s s 3"]:
        """Codes -> images.

        Args:
          codes: int [B, n] with n valid for the model: 1..causal_num, then multiples of a group;
            or the vectors of `Generator.sample(continuous=True)`, float [B, n, d].
          size: side of the images in pixels, a multiple of the decoder's patch; default what n
            tokens map to.
          batch_size: images per call of the compiled program.

        Returns:
          images about [-1, 1]. Values may leave this range: the decoder does not clip, and
          `df.to_uint8` does.

        Raises:
          ValueError: codes out of range, or n or size not valid.
        """
        codes = as_array("codes", codes)
        if codes.ndim == 3:
            check_vectors(codes, self.config.codebook_dim)
        else:
            check_codes(codes, self.config.codebook_size)
        full = self.config.resolutions.decoded_size(codes.shape[1])
        size = full if size is None else check_whole("size", size)
        decode = lambda network, params, codes: programs.decode(network, params, codes, size)  # noqa: E731
        return self.run(decode, batch_size, codes)
