"""How near a reconstruction is to its original, image by image.

Images are uint8 [B, H, W, 3]: reconstructions are rounded to 8 bits first, as published tables do.
"""

import jax
import jax.numpy as jnp

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.ops import images as pixels

WINDOW = 7


@jax.jit
def psnr(images: jax.Array, reference: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, peak 1 on [0, 1]: float32 [B]; 126 for equal images."""
    return pixels.psnr(pixels.to_float(images), pixels.to_float(reference))


@jax.jit
def ssim(images: jax.Array, reference: jax.Array, data_range: float = 1.0) -> jax.Array:
    """Structural similarity (Wang et al. 2004), mean over the image and colours: float32 [B].

    Uniform 7x7 windows inside the image, unbiased variances, K = (0.01, 0.03): the defaults of
    scikit-image. Windowed sums are whole numbers, so no digit is lost in flat regions.

    Args:
      images, reference: uint8 [B, H, W, 3], H and W at least 7.
      data_range: L of the constants (K L)^2 for pixels on [0, 1]. 1 is right; published tokenizer
        tables used 2, which gives higher values.

    Raises:
      EvaluationError: images of another shape or smaller than a window.
    """
    if images.shape != reference.shape or min(images.shape[1:3]) < WINDOW:
        raise EvaluationError(
            f"images {images.shape} and reference {reference.shape}: expected equal shapes "
            f"[B, H, W, 3] of at least {WINDOW} px"
        )
    x, y = images.astype(jnp.int32), reference.astype(jnp.int32)
    n = WINDOW**2

    def window_sum(z: jax.Array) -> jax.Array:
        size, stride = (1, WINDOW, WINDOW, 1), (1, 1, 1, 1)
        return jax.lax.reduce_window(z, 0, jax.lax.add, size, stride, "VALID")

    sum_x, sum_y = window_sum(x), window_sum(y)

    def covariance(product: jax.Array, of_sums: jax.Array) -> jax.Array:
        return (n * window_sum(product) - of_sums) / (n * (n - 1) * 255.0**2)

    variances = covariance(x * x, sum_x**2) + covariance(y * y, sum_y**2)
    shared = covariance(x * y, sum_x * sum_y)
    mean_x, mean_y = sum_x / (n * 255.0), sum_y / (n * 255.0)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * shared + c2) / (variances + c2), axis=(1, 2, 3))
