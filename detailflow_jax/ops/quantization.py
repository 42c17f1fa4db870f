"""Vector quantization on the unit sphere, and its losses.

Shapes: B batch, N tokens, V codes, d code dimension, W window. Everything is float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from detailflow_jax.ops import Array

Scalar = Float[Array, ""]


def normalize(x: Float[Array, "*batch d"], eps: float = 1e-12) -> Float[Array, "*batch d"]:
    """x / max(|x|, eps) along the last axis, in float32."""
    x = x.astype(jnp.float32)
    # The square is clamped before the root, so that the gradient at 0 is 0 and not NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, eps * eps))


def code_distances(
    z: Float[Array, "*batch d"], codebook: Float[Array, "V d"]
) -> Float[Array, "*batch V"]:
    """Squared distances from normalised vectors to every normalised code."""
    product = jnp.einsum("...d,vd->...v", z, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(z * z, -1, keepdims=True) + jnp.sum(codebook * codebook, -1) - 2.0 * product


def nearest_codes(distances: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """Index of the nearest code, int32."""
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def straight_through(
    value: Float[Array, "*shape"], through: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`value` in the forward pass, with the gradient of `through` in the backward pass."""
    return through + jax.lax.stop_gradient(value - through)


def vq_errors(
    z: Float[Array, "B N d"], codes: Float[Array, "B N d"]
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Codebook and commitment error of each token, averaged over d.

    The first moves the codes towards z, the second moves z towards the codes.
    """
    codebook_error = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)), axis=-1)
    commitment_error = jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z), axis=-1)
    return codebook_error, commitment_error


def entropy_loss(distances: Float[Array, "*batch V"], temperature: float = 0.01) -> Scalar:
    """Mean entropy minus entropy of the mean: rewards sure assignments and evenly used codes.

    p = softmax(-distances / temperature); the mean runs over batch and tokens.
    """
    log_p = jax.nn.log_softmax(-distances / temperature, axis=-1)
    p = jnp.exp(log_p)
    mean = jnp.mean(p.reshape(-1, p.shape[-1]), axis=0)
    sample_entropy = -jnp.mean(jnp.sum(p * log_p, axis=-1))
    return sample_entropy + jnp.sum(mean * jnp.log(mean + 1e-5))


def remember_codes(window: Int[Array, " W"], indices: Int[Array, "..."]) -> Int[Array, " W"]:
    """The window of the latest assignments (oldest first) with new ones pushed in; -1 is empty."""
    latest = indices.reshape(-1).astype(window.dtype)
    return jnp.concatenate([window, latest])[-window.size :]


def codebook_usage(window: Int[Array, " W"], codebook_size: int) -> Scalar:
    """Share of the codes that occur in the window, in [0, 1]."""
    # Empty places fall into an extra bin, which is cut off.
    bins = jnp.where(window < 0, codebook_size, window)
    seen = jnp.zeros(codebook_size + 1, jnp.float32).at[bins].set(1.0)
    return jnp.mean(seen[:codebook_size])
