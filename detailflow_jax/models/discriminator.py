"""Discriminators: frozen DINO features with trained heads, and PatchGAN as the light choice.

Shapes: B batch, H x W pixels, L positions, C channels, R read points, K kernel size.
Float images are [B, H, W, 3] in [-1, 1]; logits are float32 [B, positions], unbounded.

Besides its parameters a discriminator has a state, which each training forward updates: the
collections `batch_stats` (running mean and variance) and `spectral` (the singular vectors u, v).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from detailflow_jax.models import layers, siglip
from detailflow_jax.ops import Array, augment, padded

Images = Float[Array, "B H W 3"]
Positions = Float[Array, "B L C"]
Logits = Float[Array, "B positions"]

STATE = ("batch_stats", "spectral")
"""Collections that a training forward updates, without a gradient."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """Sizes of the frozen DINO and of the heads that read it; the defaults are ViT-S/16."""

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 16
    image_size: int = 224
    read_blocks: Sequence[int] = (2, 5, 8, 11)
    kernel_size: int = 9
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "read_blocks", tuple(self.read_blocks))
        if not all(0 <= block < self.depth for block in self.read_blocks):
            raise ValueError(f"read_blocks={self.read_blocks}; expected 0 to {self.depth - 1}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )

    @property
    def read_points(self) -> int:
        """R: the embedding, and every block that is read."""
        return 1 + len(self.read_blocks)


class _ReadBlock(siglip.Block):
    """A block that returns its output in place of its keys and values."""

    def __call__(self, x, prefix, mask, rope) -> tuple[Any, Any]:
        x, _ = super().__call__(x, prefix, mask, rope)
        return x, x


class Dino(nn.Module):
    """DINO ViT, read after the embedding and after some blocks, without its final norm.

    Caron et al., arXiv 2104.14294. Its GELU is the tanh approximation, as in the published
    discriminator.
    """

    config: DinoConfig

    @nn.compact
    def __call__(self, images: Images) -> tuple[Positions, ...]:
        """R features of images in [-1, 1], float32: each patch token plus the class token.

        Raises:
          ValueError: if the sides are not `config.image_size`.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if images.shape[1:3] != (c.image_size, c.image_size):
            raise ValueError(
                f"DINO was given images of {images.shape[1:3]}; expected {c.image_size} x "
                f"{c.image_size} (ops.augment.random_view brings them to it)"
            )
        images = ((images.astype(jnp.float32) + 1) / 2 - jnp.array(_MEAN)) / jnp.array(_STD)
        patch = (c.patch_size, c.patch_size)
        tokens = nn.Conv(c.width, patch, patch, "VALID", dtype=dtype, name="patch_embed")(images)
        tokens = tokens.reshape(len(images), -1, c.width)  # [B, L, C]
        init = nn.initializers.normal(0.02)
        length = tokens.shape[1] + 1
        class_token = self.param("class_token", init, (1, c.width))
        first = jnp.broadcast_to(class_token, (len(images), 1, c.width))
        table = self.param("position_table", init, (length, c.width))
        tokens = jnp.concatenate([first, tokens.astype(jnp.float32)], axis=1)  # [B, L + 1, C]
        tokens = tokens + table
        options = {"num_heads": c.num_heads, "mlp_dim": 4 * c.width, "dtype": dtype}
        blocks = layers.Stack(
            _ReadBlock, options, c.depth, scan=c.scan, remat=c.remat, name="blocks"
        )
        _, outputs = blocks(tokens)
        read = [tokens, *(outputs[block] for block in c.read_blocks)]
        return tuple((x[:, 1:] + x[:, :1]).astype(jnp.float32) for x in read)


def _uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """A convolution kernel [..., in, out] drawn from U(+-1/sqrt(fan in))."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _unit(x: jax.Array) -> jax.Array:
    """The vector divided by its length."""
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class SpectralConv(nn.Module):
    """1-D convolution with circular padding, its weight divided by its largest singular value.

    Spectral normalisation (Miyato et al., arXiv 1802.05957): a training forward takes one step of
    the power iteration and keeps u and v in the collection `spectral`; an evaluation takes none. No
    gradient flows through u and v.
    """

    features: int
    kernel_size: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Positions, *, train: bool) -> Float[Array, "B L features"]:
        """x after the convolution, in `dtype`."""
        size, width = self.kernel_size, x.shape[-1]
        kernel = self.param("kernel", _uniform_fan_in, (size, width, self.features))
        bound = 1 / math.sqrt(size * width)
        bias = self.param(
            "bias", lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
            (self.features,),
        )  # fmt: skip
        u = self.variable("spectral", "u", self._start, self.features)
        v = self.variable("spectral", "v", self._start, width * size)
        # Rows and columns in the published order, (out, in * K), so that v is the same vector.
        matrix = kernel.transpose(2, 1, 0).reshape(self.features, -1)
        sigma = self._largest(matrix, u, v, train and not self.is_initializing())
        # One matrix product, since TPU compilers take minutes for many such convolutions.
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (size // 2, size // 2), (0, 0)), mode="wrap")
        length = x.shape[1] - size + 1
        windows = jnp.concatenate([x[:, i : i + length] for i in range(size)], axis=-1)
        y = windows @ (kernel / sigma).astype(self.dtype).reshape(size * width, self.features)
        return y + bias.astype(self.dtype)

    def _start(self, size: int) -> jax.Array:
        return _unit(jax.random.normal(self.make_rng("params"), (size,)))

    @staticmethod
    def _largest(matrix: jax.Array, u: Any, v: Any, step: bool) -> jax.Array:
        """sigma = u^T W v, after one step of the power iteration if `step`."""
        with jax.default_matmul_precision("highest"):
            if step:
                fixed = jax.lax.stop_gradient(matrix)
                v.value = _unit(fixed.T @ u.value)
                u.value = _unit(fixed @ v.value)
            return u.value @ (matrix @ v.value)


class GlobalBatchNorm(nn.Module):
    """Batch norm over the batch of all devices: under `jit` a mean is over the global array.

    The running variance is unbiased and the one that normalises is biased, as in PyTorch.
    """

    epsilon: float
    momentum: float = 0.1
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"], *, train: bool) -> Float[Array, "*batch C"]:
        """x after the norm, float32."""
        x = x.astype(jnp.float32)
        width = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        var = self.variable("batch_stats", "var", jnp.ones, width)
        if not train:
            return (x - mean.value) * (scale * jax.lax.rsqrt(var.value + self.epsilon)) + bias
        axes = tuple(range(x.ndim - 1))
        batch_mean = jnp.mean(x, axis=axes)
        batch_var = jnp.mean(jnp.square(x - batch_mean), axis=axes)
        if not self.is_initializing():
            count = math.prod(x.shape[:-1])
            new = (batch_mean, batch_var * (count / max(count - 1, 1)))
            for running, value in zip((mean, var), new, strict=True):
                running.value += self.momentum * (jax.lax.stop_gradient(value) - running.value)
        return (x - batch_mean) * (scale * jax.lax.rsqrt(batch_var + self.epsilon)) + bias


class _Head(nn.Module):
    """One head: a convolution K = 1, a residual one K = 9 over sqrt 2, one logit per position."""

    kernel_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Positions, *, train: bool) -> Float[Array, "B L"]:
        width = x.shape[-1]

        def block(x, size, name):
            x = SpectralConv(width, size, self.dtype, name=f"{name}_conv")(x, train=train)
            x = GlobalBatchNorm(1e-6, name=f"{name}_norm")(x, train=train)
            return nn.leaky_relu(x, 0.2)

        x = block(x, 1, "first")
        x = (x + block(x, self.kernel_size, "residual")) * 0.5**0.5
        x = SpectralConv(1, dtype=self.dtype, name="output")(x, train=train)
        return x[..., 0].astype(jnp.float32)


class DinoHeads(nn.Module):
    """The trained part: one head per read point of DINO (StyleGAN-T, arXiv 2301.09515)."""

    config: DinoConfig

    @nn.compact
    def __call__(self, features: tuple[Positions, ...], *, train: bool) -> Logits:
        """Logits [B, R * L] of R features, in the order of reading."""
        dtype = jnp.dtype(self.config.dtype)
        logits = [
            _Head(self.config.kernel_size, dtype, name=f"head_{i}")(x, train=train)
            for i, x in enumerate(features)
        ]
        return jnp.concatenate(logits, axis=1)


def apply_heads(
    config: DinoConfig, params: Any, state: Any, features: tuple[Positions, ...], *, train: bool
) -> tuple[Logits, Any]:
    """Logits and new state as `DinoHeads.apply` returns them, with the heads in a loop.

    The heads have the same shapes, and accelerator compilers take minutes for each one written out.
    The backward pass recomputes each head: its windows are `kernel_size` times its features, and
    keeping those of all heads costs more than the arithmetic.
    """
    head = _Head(config.kernel_size, jnp.dtype(config.dtype))
    names = [f"head_{i}" for i in range(len(features))]
    each = [{"params": params[n]} | {kind: state[kind][n] for kind in state} for n in names]
    variables = jax.tree.map(lambda *x: jnp.stack(x), *each)

    @jax.checkpoint
    def one(args):
        variables, x = args
        return head.apply(variables, x, train=train, mutable=list(state))

    logits, new = jax.lax.map(one, (variables, jnp.stack(features)))
    logits = logits.swapaxes(0, 1).reshape(len(features[0]), -1)
    apart = {
        kind: {n: jax.tree.map(lambda x, i=i: x[i], tree) for i, n in enumerate(names)}
        for kind, tree in new.items()
    }
    return logits, apart


@dataclasses.dataclass(frozen=True)
class PatchGANConfig:
    """Sizes of PatchGAN; each of `num_layers` halves the sides, two further layers keep them."""

    channels: int = 64
    num_layers: int = 3
    dtype: str = "float32"


class PatchGAN(nn.Module):
    """Convolutions that judge overlapping patches (pix2pix, arXiv 1611.07004)."""

    config: PatchGANConfig

    @nn.compact
    def __call__(self, images: Images, *, train: bool) -> Logits:
        """Logits of the patches, row by row.

        Raises:
          ValueError: if the images are too small for a single patch.
        """
        c = self.config
        smallest = 3 * 2**c.num_layers
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchGAN with num_layers={c.num_layers} was given images of {images.shape[1:3]}; "
                f"expected sides of {smallest} at least: use fewer layers"
            )
        x = nn.leaky_relu(self._conv("conv_0", c.channels, 2)(images), 0.2)
        for i in range(1, c.num_layers + 1):
            stride = 2 if i < c.num_layers else 1
            x = self._conv(f"conv_{i}", c.channels * min(2**i, 8), stride, use_bias=False)(x)
            init = lambda key, shape: 1 + 0.02 * jax.random.normal(key, shape)  # noqa: E731
            x = GlobalBatchNorm(1e-5, scale_init=init, name=f"norm_{i}")(x, train=train)
            x = nn.leaky_relu(x, 0.2)
        x = self._conv("output", 1, 1)(x)
        return x.reshape(len(x), -1).astype(jnp.float32)

    def _conv(self, name: str, features: int, stride: int, *, use_bias: bool = True) -> nn.Conv:
        return nn.Conv(
            features,
            (4, 4),
            (stride, stride),
            ((1, 1), (1, 1)),
            use_bias=use_bias,
            dtype=jnp.dtype(self.config.dtype),
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )


# ------------------------------------------------------------------------------ for training tasks


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """Pure functions from images to logits; the caller keeps parameters, state and frozen part.

    Attributes:
      network: the trained part.
      trunk: the frozen part that it reads, or None.
    """

    network: nn.Module
    trunk: Dino | None = None

    def init(self, key: PRNGKeyArray, image_size: int) -> tuple[Any, Any, Any]:
        """Random (trained parameters, state, frozen parameters) for images of a size.

        They are nested dicts. The frozen part is in flax boxes that name its axes for sharding.
        """
        example = jnp.zeros((1, image_size, image_size, 3))
        trunk_key, key = jax.random.split(key)
        frozen = {}
        if self.trunk is not None:
            size = self.trunk.config.image_size
            example = jnp.zeros((1, size, size, 3))
            example, variables = self.trunk.init_with_output(trunk_key, example)
            frozen = variables["params"]
        variables = dict(self.network.init(key, example, train=True))
        return variables.pop("params"), {k: variables[k] for k in STATE if k in variables}, frozen

    def logits(
        self,
        params: Any,
        state: Any,
        frozen: Any,
        images: Images,
        *,
        train: bool,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Logits, Any]:
        """The logits of images, and the state after this forward.

        Args:
          params: trained parameters.
          state: from `init` or the last training forward.
          frozen: parameters of DINO; empty for PatchGAN.
          images: in [-1, 1], any size.
          train: whether to normalise by this batch and to update the state.
          key: draws DINO's view of the images (`augment.random_view`); None resizes them.
        """
        features = self.read(frozen, self.view(key, images))
        return self.judge(params, state, features, train=train)

    def view(
        self, key: PRNGKeyArray | None, images: Images, part: padded.Part | None = None
    ) -> Float[Array, "B _ _ 3"]:
        """Images as the network takes them: unchanged for PatchGAN, a random view for DINO.

        DINO's can be of a part of the images.
        """
        if self.trunk is None:
            return images
        return augment.random_view(key, images, self.trunk.config.image_size, part)

    def read(self, frozen: Any, views: Images) -> Any:
        """What the trained part judges, computed per image: DINO's features, or the image."""
        if self.trunk is None:
            return views
        return self.trunk.apply({"params": frozen}, views)

    def judge(self, params: Any, state: Any, features: Any, *, train: bool) -> tuple[Logits, Any]:
        """Logits of what `read` returned, and the state after this forward; see `logits`."""
        if self.trunk is not None:
            logits, new = apply_heads(self.trunk.config, params, state, features, train=train)
            return logits, new if train else state
        variables = {"params": params, **state}
        if not train:
            return cast(jax.Array, self.network.apply(variables, features, train=False)), state
        logits, new = self.network.apply(variables, features, train=True, mutable=list(state))
        return logits, new


def make(config: DinoConfig | PatchGANConfig) -> Discriminator:
    """The discriminator of a configuration."""
    if isinstance(config, PatchGANConfig):
        return Discriminator(PatchGAN(config))
    return Discriminator(DinoHeads(config), Dino(config))
