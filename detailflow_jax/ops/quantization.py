"""Vector quantization on the unit sphere, and its losses (facts of the published quantizer).

Shapes: B batch, N tokens, V codes, d code dimension. Everything is float32.
"""

import jax
import jax.numpy as jnp


def normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) along the last axis, in float32."""
    x = x.astype(jnp.float32)
    # The root is taken of a value kept away from 0, so that the gradient at 0 is 0 and not NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, eps * eps))


def code_distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances of normalised z [..., d] and codebook [V, d]: [..., V]."""
    product = jnp.einsum("...d,vd->...v", z, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(z * z, -1, keepdims=True) + jnp.sum(codebook * codebook, -1) - 2.0 * product


def nearest_codes(distances: jax.Array) -> jax.Array:
    """Index of the nearest code: int32 [...], from distances [..., V]."""
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def straight_through(value: jax.Array, through: jax.Array) -> jax.Array:
    """`value` in the forward pass, the gradient of `through` in the backward pass."""
    return through + jax.lax.stop_gradient(value - through)


def vq_errors(z: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per-token codebook and commitment errors, averaged over d: two arrays [B, N].

    The first moves the codes towards z, the second z towards the codes.
    """
    codebook_error = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)), axis=-1)
    commitment_error = jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z), axis=-1)
    return codebook_error, commitment_error


def entropy_loss(distances: jax.Array, temperature: float = 0.01) -> jax.Array:
    """Sure assignments, evenly used codes: mean entropy minus entropy of the mean, a scalar.

    p = softmax(-distances / temperature); the mean runs over batch and tokens.
    """
    log_p = jax.nn.log_softmax(-distances / temperature, axis=-1)
    p = jnp.exp(log_p)
    mean = jnp.mean(p.reshape(-1, p.shape[-1]), axis=0)
    sample_entropy = -jnp.mean(jnp.sum(p * log_p, axis=-1))
    return sample_entropy + jnp.sum(mean * jnp.log(mean + 1e-5))


def remember_codes(window: jax.Array, indices: jax.Array) -> jax.Array:
    """Push indices into the window [W] of the latest assignments (oldest first); -1 is empty."""
    latest = indices.reshape(-1).astype(window.dtype)
    return jnp.concatenate([window, latest])[-window.size :]


def codebook_usage(window: jax.Array, codebook_size: int) -> jax.Array:
    """Share of the codes that the window [W] holds: a float32 scalar in [0, 1]."""
    # Empty places count into an extra bin that is cut off.
    bins = jnp.where(window < 0, codebook_size, window)
    seen = jnp.zeros(codebook_size + 1, jnp.float32).at[bins].set(1.0)
    return jnp.mean(seen[:codebook_size])
