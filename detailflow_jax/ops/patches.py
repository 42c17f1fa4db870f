"""Images to sequences of patches and back, in (row, column, channel) order inside a patch.

Shapes: B batch, H x W pixels, C channels, P patches in row-major order, F = p*p*C values of one.
"""

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from detailflow_jax.ops import Array, padded


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


def blend(
    windows: Float[Array, "B {height*width} F"],
    patch_size: int,
    height: int,
    width: int,
    part: padded.Part | None = None,
) -> Float[Array, "B {height*patch_size} {width*patch_size} C"]:
    """The images of a grid of overlapping windows, twice as wide as the patches under them.

    A window is painted over its patch and half a patch around it. Its weight falls linearly from
    its middle to its edge, and the weights of all windows over a pixel are made to add up to 1: no
    pixel changes abruptly from one window to the next. Where a `part` of the grid is filled, the
    windows outside of it are zero, and so are the pixels.
    """
    p = patch_size
    rise = (np.arange(p) + 0.5) / p
    ramp = np.concatenate([rise, rise[::-1]])  # at a distance of p, two of them add up to 1
    pattern = "b (h w) (i p j q c) -> b h w i p j q c"
    parts = einops.rearrange(windows, pattern, h=height, w=width, i=2, j=2, p=p, q=p)
    parts *= (ramp[:, None] * ramp).reshape(2, p, 2, p, 1).astype(np.float32)
    quarters = [  # of the windows, each on a grid of patches one larger than the image
        jnp.pad(parts[:, :, :, i, :, j], [(0, 0), (i, 1 - i), (j, 1 - j), (0, 0), (0, 0), (0, 0)])
        for i in (0, 1)
        for j in (0, 1)
    ]
    picture = einops.rearrange(sum(quarters, jnp.zeros(())), "b h w p q c -> b (h p) (w q) c")
    half = p // 2
    picture = picture[:, half : half + height * p, half : half + width * p]
    rows, columns = (
        padded.pick(lambda n: _scale(n * p, p), side, part) for side in (height, width)
    )
    return picture * (rows[:, None, None] * columns[:, None])


def _scale(side: int, patch_size: int) -> np.ndarray:
    """1 / the sum of the windows' weights along an axis: not 1 only half a patch from its ends."""
    at = np.arange(side)
    from_end = np.minimum(at, at[::-1])
    covered = np.minimum((patch_size // 2 + from_end + 0.5) / patch_size, 1)
    return (1 / covered).astype(np.float32)
