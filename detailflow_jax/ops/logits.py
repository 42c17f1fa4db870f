"""From logits to codes: classifier-free guidance, filters, sampling. All float32.

Shapes: B samples, N tokens of the model, n tokens at hand, V codes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32, Key, Shaped

from detailflow_jax.ops import Array


def guidance_scales(
    scale: float, num_tokens: int, group_size: int, causal_num: int, *, gradual: bool = False
) -> Float32[np.ndarray, " N"]:
    """The guidance scale at each token.

    Constant, or gradual: of the G = N/g groups, the zero-based group i >= c/g has the scale
    s * (G - i + 1)/(G + 1), earlier groups s (behaviour of the published sampler).
    """
    group = np.arange(num_tokens) // group_size
    groups = num_tokens // group_size
    falling = scale * (groups - group + 1) / (groups + 1)
    return np.where(gradual & (group >= causal_num // group_size), falling, scale).astype(
        np.float32
    )


def pair(
    conditional: Shaped[Array, "B ..."], null: Shaped[Array, "B ..."]
) -> Shaped[Array, "2*B ..."]:
    """Conditional and null rows as one array, with the two rows of a sample beside each other.

    One half after the other would move every row between the devices that share a batch.
    """
    both = jnp.stack([conditional, null], axis=1)
    return both.reshape(-1, *both.shape[2:])


def unpair(
    rows: Shaped[Array, "R ..."],
) -> tuple[Shaped[Array, "R//2 ..."], Shaped[Array, "R//2 ..."]]:
    """The inverse of `pair`."""
    both = rows.reshape(-1, 2, *rows.shape[1:])
    return both[:, 0], both[:, 1]


def guide(
    conditional: Float[Array, "*shape"],
    null: Float[Array, "*shape"],
    scale: Array | np.floating | float,
) -> Float[Array, "*shape"]:
    """u + (c - u) * s of conditional c and null u; the scale is broadcast."""
    return null + (conditional - null) * scale


def top_k_filter(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """-inf below the k-th largest logit (ties with it stay); k = 0 or k >= V keeps everything."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    largest, places = jax.lax.top_k(logits, k)
    # By place as well as by value: the compiler may compute the logits twice, rounded differently,
    # and the k-th would then be below itself.
    chosen = jnp.zeros(logits.shape, bool)
    chosen = jnp.put_along_axis(chosen, places, True, axis=-1, inplace=False)
    return jnp.where(chosen | (logits >= largest[..., -1:]), logits, -jnp.inf)


def top_p_filter(
    logits: Float[Array, "*B V"], p: Array | np.floating | float
) -> Float[Array, "*B V"]:
    """-inf outside the smallest set of most likely codes whose probability exceeds p.

    The code that crosses p is kept, so at least one always is.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    cumulative = jnp.cumsum(probability, axis=-1)
    # A code goes when the codes *before* it already exceed p.
    before = jnp.concatenate([jnp.zeros_like(cumulative[..., :1]), cumulative[..., :-1]], axis=-1)
    ranked = jnp.where(before > p, -jnp.inf, ranked)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample_codes(keys: Key[Array, " B"], logits: Float[Array, "B n V"]) -> Int32[Array, "B n"]:
    """One code per position, drawn by the Gumbel-max trick.

    There is one PRNG key per *sample*: a sample's draw does not depend on its neighbours.
    """
    draw = jax.vmap(lambda key, row: jax.random.categorical(key, row, axis=-1))
    return draw(keys, logits).astype(jnp.int32)
