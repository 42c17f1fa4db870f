"""What the networks share: dense layers, norms, attention and the stack of blocks.

Shapes: B batch, T tokens, S tokens that keys and values come from (mostly T), P prefix tokens,
D width, H heads, K key/value heads, h head dimension, L layers.
Parameters are float32 and carry logical axis names. Compute runs in `dtype`; norms, softmax and
attention scores are float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from detailflow_jax.ops import Array, attention, rotary
from detailflow_jax.runtime import compiler, flops

Tokens = Float[Array, "B T D"]
Mask = attention.Mask
Rope = Float[Array, "T half 2"]
"""Rotary table; half = h/2 (`ops.rotary`)."""
KeysValues = tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]
Prefix = attention.Prefix
LayerCache = Any
"""Keys and values of every layer: stacked, [L, B, S, K, h], if scanned, else a list of pairs."""

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}
"""What a block keeps for its backward pass: everything, only its input, or matmul outputs too."""

XAVIER = nn.initializers.xavier_uniform()


def dense(
    features: int,
    axes: tuple[str, str],
    *,
    dtype: Any,
    use_bias: bool = True,
    kernel_init: Callable = XAVIER,
    name: str | None = None,
) -> nn.Dense:
    """`nn.Dense` whose kernel [in, out] and bias carry the logical names `axes`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def apply(
    module: nn.Module, params: Any, *args: Any, method: Any = None, rngs: Any = None, **kwargs: Any
) -> Any:
    """What a method of a network gives, `__call__` by default, with these parameters."""
    return module.apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)


def param(
    module: nn.Module,
    name: str,
    init: Callable,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
) -> Array:
    """A parameter of the module that carries the logical names `axes`."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


def by_batch(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x [B, ...], split over the devices along its batch and whole along all else.

    Without this the compiler may place an activation as the parameters near it, split along its
    width, and then gathers the whole batch on every device.
    """
    return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))


def table(
    module: nn.Module, name: str, rows: int, width: int, std: float = 0.02
) -> Float[Array, "{rows} {width}"]:
    """A learned table with one row per position, which starts with standard deviation `std`."""
    return param(module, name, nn.initializers.normal(std), ("positions", "embed"), (rows, width))


def conv(
    features: int, size: int, dtype: Any, *, padding: Any = "SAME", stride: int = 1, **options: Any
) -> nn.Conv:
    """A convolution of `size` x `size`, whose output is split as the width of a model."""
    init = nn.with_logical_partitioning
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        kernel_init=init(nn.initializers.lecun_normal(), (None, None, None, "embed")),
        bias_init=init(nn.initializers.zeros, ("norm",)),
        **options,
    )


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """LayerNorm, eps 1e-6, computed and returned in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


def rms_norm(name: str | None = None, epsilon: float = 1e-5) -> nn.RMSNorm:
    """RMSNorm computed and returned in float32."""
    return nn.RMSNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        name=name,
    )


def attend(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    *,
    prefix: Prefix | None = None,
    mask: Mask | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H h"]:
    """Attention by the implementation that suits the shapes and the devices in use.

    See `ops.attention`: `plain` says what is computed, `choose` by what. Kernels that the compiler
    cannot split run on each device's own samples and heads.
    """
    mask = attention.static(mask)
    bare = prefix is None and drop is None
    chosen = attention.choose(
        implementation, compiler.platform(), query, key, mask, bare=bare and _divides(query, key)
    )
    if chosen == "cudnn":
        return attention.cudnn(query, key, value, mask)
    if chosen == "splash":
        return _on_each_device(attention.splash, query, key, value, mask)
    drop = drop or (lambda weights: weights)
    return attention.plain(query, key, value, prefix=prefix, mask=mask, drop=drop)


_BY_HEAD = ("batch", "length", "heads", None)


def _divides(query: Array, key: Array) -> bool:
    """Whether the devices in use can share out the samples and the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return True
    groups = [(axes,) if isinstance(axes, str) else axes or () for axes in _axes(_BY_HEAD)]
    batch, _, heads, _ = (math.prod(mesh.shape[axis] for axis in axes) for axes in groups)
    return query.shape[0] % batch == 0 and key.shape[2] % heads == query.shape[2] % heads == 0


def _axes(names: Sequence[str | None]) -> jax.sharding.PartitionSpec:
    return jax.sharding.PartitionSpec(*(nn.logical_to_mesh_axes(names) or ()))


def _on_each_device(
    fused: Callable[..., Array], query: Array, key: Array, value: Array, mask: Mask | None
) -> Array:
    if jax.sharding.get_abstract_mesh().empty:
        return fused(query, key, value, mask)
    by_head = _axes(_BY_HEAD)
    dynamic = mask is not None and not isinstance(mask, attention.StaticMask)
    of_mask = _axes(("batch" if dynamic and len(mask) > 1 else None, None, None, None))
    return jax.shard_map(
        fused,
        in_specs=(by_head, by_head, by_head, of_mask),
        out_specs=by_head,
        check_vma=False,  # Kernels do not say over which axes their results differ.
    )(query, key, value, mask)


class Attention(nn.Module):
    """Multi-head attention over its own tokens and, before them, an optional prefix.

    It serves four uses. The encoder's queries look at the patches of their image (a prefix), a
    cached decoding step looks at the past (a prefix), self-attention has no prefix, and
    cross-attention takes its keys and values from a context.

    Attributes:
      num_heads: H.
      num_kv_heads: K.
      use_bias: of the projections to queries, keys and values.
      dtype: of the computation.
      kernel_init: of all projections.
      output_bias: of the output projection; None: the same as `use_bias`.
      dropout: rate on the attention weights; active if the caller passes a `dropout` key.
      implementation: one of `ops.attention.IMPLEMENTATIONS`.
    """

    num_heads: int
    num_kv_heads: int
    use_bias: bool
    dtype: Any
    kernel_init: Callable = XAVIER
    output_bias: bool | None = None
    dropout: float = 0.0
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        *,
        prefix: Prefix | None = None,
        mask: Mask | None = None,
        rope: Rope | None = None,
        context: Float[Array, "B T C"] | None = None,
    ) -> tuple[Tokens, KeysValues]:
        """The tokens after attention, and their own keys (turned by `rope`) and values.

        `context` gives the keys and values in place of x, at the same positions.
        """
        width = x.shape[-1]
        head_dim = width // self.num_heads
        read = x if context is None else context

        def project(name: str, x: Array, heads: int) -> jax.Array:
            layer = dense(
                heads * head_dim,
                ("embed", "heads"),
                dtype=self.dtype,
                use_bias=self.use_bias,
                kernel_init=self.kernel_init,
                name=name,
            )
            y = layer(x).reshape(*x.shape[:-1], heads, head_dim)
            return nn.with_logical_constraint(y, ("batch", "length", "heads", None))

        query = project("q_proj", x, self.num_heads)
        key = project("k_proj", read, self.num_kv_heads)
        value = project("v_proj", read, self.num_kv_heads)
        if rope is not None:
            on_tpu = compiler.platform() == "tpu"
            rotate = rotary.rotate_by_product if on_tpu else rotary.rotate
            with jax.named_scope(flops.EXTRA):
                query, key = rotate(query, rope), rotate(key, rope)
        dropping = self.dropout > 0 and self.has_rng("dropout")
        drop = nn.Dropout(self.dropout, deterministic=False) if dropping else None
        by = self.implementation
        out = attend(query, key, value, prefix=prefix, mask=mask, drop=drop, implementation=by)
        out_proj = dense(
            width,
            ("heads", "embed"),
            dtype=self.dtype,
            use_bias=self.use_bias if self.output_bias is None else self.output_bias,
            kernel_init=self.kernel_init,
            name="out_proj",
        )
        return by_batch(out_proj(out.reshape(x.shape))), (key, value)


class Modulation(nn.Module):
    """Vectors that modulate a block, from a condition: one dense layer, cut into `parts`.

    Each part is a product of its own, so that no array holds them all: at one condition per
    position that would be the largest of the block.
    """

    parts: int
    features: int
    dtype: Any
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(
        self, condition: Float[Array, "B T C"]
    ) -> list[Float[Array, "B T {self.features}"]]:
        """The parts, in the order of the kernel's columns."""
        width = self.parts * self.features
        shape = (condition.shape[-1], width)
        kernel = param(self, "kernel", self.kernel_init, ("embed", "mlp"), shape)
        bias = param(self, "bias", nn.initializers.zeros, ("mlp",), (width,))
        x = condition.astype(self.dtype)
        kernels = jnp.split(kernel.astype(self.dtype), self.parts, axis=1)
        biases = jnp.split(bias.astype(self.dtype), self.parts)
        return [by_batch(x @ k + b) for k, b in zip(kernels, biases, strict=True)]


class GatedMLP(nn.Module):
    """fc2(gelu(fc1_g x) * fc1_x x) with the exact GELU and biases everywhere."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        gate = dense(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1_g")(x)
        y = dense(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1_x")(x)
        y = nn.gelu(gate, approximate=False) * y  # [B, T, hidden]
        y = nn.with_logical_constraint(y, ("batch", "length", "mlp"))
        return by_batch(dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="fc2")(y))


class Stack(nn.Module):
    """`depth` equal blocks, scanned over stacked parameters or unrolled.

    A block maps (x, prefix, mask, rope, *context) to (x, its own keys and values). The parameters
    of a scanned stack are in `layers`, with a leading layer axis; those of an unrolled one are in
    `layers_0`, `layers_1`, ...
    """

    block: type[nn.Module]
    options: Mapping[str, Any]
    depth: int
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Any,
        *,
        prefix: LayerCache | None = None,
        mask: Mask | None = None,
        rope: Rope | None = None,
        context: Sequence[Array] = (),
    ) -> tuple[Any, LayerCache]:
        """Runs all blocks.

        Args:
          x: [B, T, D], or whatever the block maps to itself.
          prefix: keys and values of every layer that come before the own ones.
          mask: the same for every layer.
          rope: rotary table of the T positions.
          context: further arguments of the blocks, the same for each, such as a condition.

        Returns:
          x after the last block, and every layer's own keys and values.
        """
        block, mask = self.block, attention.static(mask)
        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            block = nn.remat(block, policy=policy, prevent_cse=not self.scan)
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, *[nn.broadcast] * (2 + len(context))),
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(**self.options, name="layers")
            return layers(x, prefix, mask, rope, *context)
        own = []
        for i in range(self.depth):
            layer_prefix = None if prefix is None else prefix[i]
            layer = block(**self.options, name=f"layers_{i}")
            x, keys_values = layer(x, layer_prefix, mask, rope, *context)
            own.append(keys_values)
        return x, own


def drop_labels(key: PRNGKeyArray, labels: Int[Array, " B"], config: Any) -> Int[Array, " B"]:
    """Labels, each replaced by the null class with probability `config.class_dropout`.

    The null class is `config.num_classes`; classifier-free guidance needs it.
    """
    dropped = jax.random.bernoulli(key, config.class_dropout, labels.shape)
    return jnp.where(dropped, config.num_classes, labels)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of scanned stacks (`layers`) as those of unrolled ones (`layers_i`).

    On a CPU, separate arrays decode faster than a scan that slices stacked ones.
    """
    out = {}
    for name, value in params.items():
        if name == "layers":
            depth = len(jax.tree.leaves(value)[0])
            for i in range(depth):
                out[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], value)
        else:
            out[name] = unstack_layers(value) if isinstance(value, Mapping) else value
    return out


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`."""
    out = {}
    depth = sum(name.startswith("layers_") for name in params)
    if depth:
        layers = [params[f"layers_{i}"] for i in range(depth)]
        out["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    for name, value in params.items():
        if not name.startswith("layers_"):
            out[name] = stack_layers(value) if isinstance(value, Mapping) else value
    return out
