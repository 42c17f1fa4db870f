"""Images to sequences of patches and back, in (row, column, channel) order inside a patch.

Shapes: B batch, H x W pixels, C channels, P patches in row-major order, F = p*p*C values of one.
"""

import einops
from jaxtyping import Shaped

from detailflow_jax.ops import Array


def patchify(images: Shaped[Array, "B H W C"], patch_size: int) -> Shaped[Array, "B P F"]:
    """Images as patches of p x p pixels: [B, (H/p)(W/p), p*p*C].

    Raises:
      ValueError: if a side is not a multiple of the patch size.
    """
    height, width = images.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} pixels is not a whole number of patches of {patch_size}; "
            f"resize or crop it to multiples of {patch_size}"
        )
    pattern = "b (h p) (w q) c -> b (h w) (p q c)"
    return einops.rearrange(images, pattern, p=patch_size, q=patch_size)


def unpatchify(
    patches: Shaped[Array, "B {height*width} F"], patch_size: int, height: int, width: int
) -> Shaped[Array, "B {height*patch_size} {width*patch_size} C"]:
    """The images of a grid of height x width patches; the inverse of `patchify`."""
    pattern = "b (h w) (p q c) -> b (h p) (w q) c"
    return einops.rearrange(patches, pattern, p=patch_size, q=patch_size, h=height, w=width)
