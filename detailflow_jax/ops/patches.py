"""Images to sequences of patches and back, in (row, column, channel) order inside a patch."""

import einops
import jax


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p)(W/p), p*p*C], patches in row-major order.

    Raises:
      ValueError: a side is not a multiple of the patch size.
    """
    height, width = images.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} pixels is not a whole number of patches of {patch_size}; "
            f"resize or crop it to multiples of {patch_size}"
        )
    pattern = "b (h p) (w q) c -> b (h w) (p q c)"
    return einops.rearrange(images, pattern, p=patch_size, q=patch_size)


def unpatchify(patches: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """[B, height*width, p*p*C] -> [B, height*p, width*p, C]; `height`, `width` count patches."""
    pattern = "b (h w) (p q c) -> b (h p) (w q) c"
    return einops.rearrange(patches, pattern, p=patch_size, q=patch_size, h=height, w=width)
