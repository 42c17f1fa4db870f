"""The DetailFlow generator: a causal transformer that predicts later groups in parallel.

Shapes: B batch, T positions, N tokens, V codes, D width, K key/value heads, h head dimension.
Sizes: g group, c causal tokens.

The sequence of length N is [class, z_1 .. z_c, s_1 .. s_{g-1}, z_{c+1} .. z_{N-g}], s being the
special embeddings. Position p predicts z_{p+1}, without a further shift. With c = 0 the first group
is predicted in parallel as well, from [class, s_1 .. s_{g-1}].

Here a token is a choice among the codes. `models/flow_generator.py` has the same transformer with a
flow head.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from detailflow_jax.models import layers
from detailflow_jax.models.flow_head import FlowHeadConfig
from detailflow_jax.models.layers import KeysValues, LayerCache, Mask, Prefix, Rope, Tokens
from detailflow_jax.ops import Array, masks, resolution, rotary

Labels = Int[Array, " B"]
HEADS = {
    "categorical": "each token of a group is a choice among the codes, by its own logits",
    "flow": "the tokens of a group are drawn jointly, as vectors (`models/flow_generator.py`)",
}
"""How the tokens of a group are made."""


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Sizes and options of the network. The defaults are GPT-L over 128 tokens."""

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    num_kv_heads: int | None = None  # None: num_heads
    multiple_of: int = 256
    num_tokens: int = 128
    group_size: int = 8
    causal_num: int | None = None  # None: one group; 0: not even the first group is causal
    codebook_size: int = 8192
    num_classes: int = 1000
    class_dropout: float = 0.1
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    dtype: str = "float32"
    attention: str = "auto"  # one of `ops.attention.IMPLEMENTATIONS`
    scan: bool = True
    remat: str = "none"
    head: str = "categorical"  # one of `HEADS`; what follows is read with "flow"
    code_dim: int = 8
    flow_width: int = 1024
    flow_depth: int = 2
    flow_head_dim: int = 64
    injection: str = "spatial"

    def __post_init__(self):
        masks.check_groups(self.num_tokens, self.group_size, self.causal)
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width={self.width} is no multiple of 4 x num_heads={self.num_heads}, which "
                "2-D rotary positions need"
            )
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} is not one of {', '.join(HEADS)}")
        if self.head == "flow":
            self.flow_head_rope()
            self.flow_head  # noqa: B018  (its own checks run)

    @property
    def causal(self) -> int:
        """c, the number of tokens that are generated one by one."""
        return self.group_size if self.causal_num is None else self.causal_num

    @property
    def kv_heads(self) -> int:
        """K, the number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """SwiGLU hidden width: 8D/3 rounded up to `multiple_of`."""
        return -(-int(8 * self.width / 3) // self.multiple_of) * self.multiple_of

    def rope(self) -> Float[np.ndarray, "N half 2"]:
        """Rotary table of the N positions, float32."""
        table = rotary.group_rotary_table(self.num_tokens, self.group_size, self.head_dim)
        return table[: self.num_tokens]

    @property
    def flow_head(self) -> FlowHeadConfig:
        """The flow head's configuration."""
        return FlowHeadConfig(
            width=self.flow_width,
            depth=self.flow_depth,
            channels=self.code_dim,
            injection=self.injection,
            head_dim=self.flow_head_dim,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
        )

    def flow_head_rope(self) -> Float[np.ndarray, "N half 2"]:
        """Rotary table of the flow head, whose positions are the N tokens; float32."""
        return rotary.group_rotary_table(self.num_tokens, self.group_size, self.flow_head_dim)[1:]

    def draws(self) -> Int[np.ndarray, " N"]:
        """Which draw makes each token: the first c have one each, later groups one together."""
        token, c = np.arange(self.num_tokens), self.causal
        return np.where(token < c, token, c + (token - c) // self.group_size)

    def check_num_tokens(self, num_tokens: int) -> None:
        """Raises ValueError unless n is 1..c or a multiple of g up to N."""
        single = 1 <= num_tokens <= self.causal
        grouped = num_tokens % self.group_size == 0 and 0 < num_tokens <= self.num_tokens
        if not (single or grouped):
            raise ValueError(
                f"num_tokens={num_tokens} is not valid for this generator; valid counts are "
                + resolution.describe_counts(self.num_tokens, self.group_size, self.causal)
            )


SIZES = {
    name: {"depth": depth, "num_heads": heads, "width": width}
    for name, (depth, heads, width) in {
        "GPT-B": (12, 12, 768),
        "GPT-L": (24, 16, 1024),
        "GPT-XL": (36, 20, 1280),
        "GPT-XLPlus": (42, 22, 1408),
        "GPT-XXL": (48, 24, 1536),
        "GPT-XXLPlus": (48, 30, 1920),
        "GPT-XXXL": (48, 40, 2560),
        "GPT-1B": (22, 32, 2048),
        "GPT-3B": (24, 32, 3200),
        "GPT-7B": (32, 32, 4096),
    }.items()
}
"""Published sizes by name."""

INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Pre-norm RMSNorm, rotary attention without biases, SwiGLU; dropout on both outputs."""

    config: GeneratorConfig

    @nn.compact
    def __call__(
        self, x: Tokens, prefix: Prefix | None, mask: Mask | None, rope: Rope | None
    ) -> tuple[Tokens, KeysValues]:
        """x after the block, and its own keys and values."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        # Dropout is active if the caller passes a `dropout` key.
        deterministic = not self.has_rng("dropout")
        attention = layers.Attention(
            c.num_heads,
            c.kv_heads,
            use_bias=False,
            dtype=dtype,
            kernel_init=INIT,
            implementation=c.attention,
            name="attention",
        )
        y = layers.rms_norm("attention_norm")(x).astype(dtype)
        y, keys_values = attention(y, prefix=prefix, mask=mask, rope=rope)
        x = x + nn.Dropout(c.residual_dropout)(y, deterministic=deterministic)

        def project(name: str, features: int, axes: tuple[str, str]) -> nn.Dense:
            return layers.dense(
                features, axes, dtype=dtype, use_bias=False, kernel_init=INIT, name=name
            )

        y = layers.rms_norm("ffn_norm")(x).astype(dtype)
        gate = project("w1", c.mlp_dim, ("embed", "mlp"))(y)
        y = nn.silu(gate) * project("w3", c.mlp_dim, ("embed", "mlp"))(y)  # [B, T, mlp_dim]
        y = nn.with_logical_constraint(y, ("batch", "length", "mlp"))
        y = project("w2", c.width, ("mlp", "embed"))(y)
        x = x + nn.Dropout(c.residual_dropout)(y, deterministic=deterministic)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), keys_values


def _embedding(rows: int, width: int, axis: str, std: float = 0.02) -> nn.Embed:
    init = nn.with_logical_partitioning(nn.initializers.normal(std), (axis, "embed"))
    return nn.Embed(rows, width, embedding_init=init)


class Transformer(nn.Module):
    """What generators share: `run` is teacher forcing, `step` one cached step.

    A subclass embeds codes, and reads out what tokens are drawn from.
    """

    config: GeneratorConfig

    def setup(self):
        c = self.config
        self.class_embedding = _embedding(c.num_classes + 1, c.width, "positions")
        # The published code creates these after its init pass, so they start at std 1.
        self.special_embedding = _embedding(c.group_size - 1, c.width, "positions", std=1.0)
        self.blocks = layers.Stack(Block, {"config": c}, c.depth, scan=c.scan, remat=c.remat)
        self.final_norm = layers.rms_norm()
        self.dropout = nn.Dropout(c.token_dropout)

    def embed_class(self, labels: Labels) -> Float[Array, "B 1 D"]:
        """Embedded labels; `num_classes` is the null class."""
        return self.class_embedding(labels)[:, None].astype(self.config.dtype)

    def embed_codes(self, codes: Int[Array, "B T"]) -> Tokens:
        """Embedded codes."""
        raise NotImplementedError

    def read_out(self, x: Tokens) -> Float[Array, "B T _"]:
        """The blocks' output as logits, or as semantics of a flow head; float32."""
        raise NotImplementedError

    def embed_special(self, batch: int) -> Float[Array, "{batch} g_minus_1 D"]:
        """The g - 1 special embeddings, for a batch."""
        c = self.config
        if c.group_size == 1:  # The unused table is never created; checkpoints reject empty ones.
            return jnp.zeros((batch, 0, c.width), c.dtype)
        special = self.special_embedding.embedding.astype(c.dtype)
        return jnp.broadcast_to(special, (batch, *special.shape))

    def run(self, codes: Int[Array, "B n"], labels: Labels) -> Float[Array, "B N D"]:
        """The blocks' output of all tokens under teacher forcing; position p is that of z_{p+1}.

        Dropout is active if a `dropout` key is passed.

        Args:
          codes: [B, N] in [0, V), or only those that are read: N - g, or N - 1 if c = N.
          labels: class of each sample; `num_classes` is the null class (`layers.drop_labels`).
        """
        c = self.config
        # One look-up: its gradient passes between the devices once.
        read = max(c.causal, c.num_tokens - c.group_size)
        embedded = self.embed_codes(codes[:, :read])
        parts = [
            self.embed_class(labels),
            embedded[:, : c.causal],
            self.embed_special(len(codes)),
            embedded[:, c.causal :],
        ]
        # If every token is causal (c = N), the sequence ends with z_{N-1}, before the specials.
        x = jnp.concatenate(parts, axis=1)[:, : c.num_tokens]
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        mask = masks.group_mask(c.num_tokens, c.group_size, c.causal)[None, None]
        return self.blocks(x, mask=mask, rope=c.rope())[0]

    def step(
        self, x: Tokens, cache: LayerCache, start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T _"], LayerCache]:
        """`read_out` of T positions at once, all seeing each other and the past; float32.

        Args:
          x: embedded tokens.
          cache: keys and values [B, N, K, h] of every layer; see `empty_cache`.
          start: the number of positions that are in the cache.

        Returns:
          What the tokens are drawn from, and the new positions' keys and values of every layer.
        """
        length = x.shape[1]
        past = jnp.arange(jax.tree.leaves(cache)[0].shape[-3]) < start
        mask = jnp.concatenate([past, jnp.ones((length,), bool)])[None, None, None]
        rope = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.config.rope()), start, length)
        x, keys_values = self.blocks(x, prefix=cache, mask=mask, rope=rope)
        return self.read_out(x), keys_values


class Generator(Transformer):
    """Logits from codes and labels."""

    def setup(self):
        super().setup()
        c = self.config
        self.token_embedding = _embedding(c.codebook_size, c.width, "vocab")
        self.output = layers.dense(
            c.codebook_size,
            ("embed", "vocab"),
            dtype=jnp.dtype(c.dtype),
            use_bias=False,
            kernel_init=nn.initializers.zeros,
        )

    def embed_codes(self, codes: Int[Array, "B T"]) -> Tokens:
        """Embedded codes."""
        return self.token_embedding(codes).astype(self.config.dtype)

    def read_out(self, x: Tokens) -> Float[Array, "B T V"]:
        """Logits of the blocks' output, float32."""
        x = self.final_norm(x).astype(self.config.dtype)
        logits = self.output(x).astype(jnp.float32)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    def __call__(self, codes: Int[Array, "B n"], labels: Labels) -> Float[Array, "B N V"]:
        """Logits of all tokens under teacher forcing, float32; see `run`."""
        return self.read_out(self.run(codes, labels))


def empty_cache(config: GeneratorConfig, batch: int) -> LayerCache:
    """Zero keys and values for N positions: stacked over layers if scanned, else a pair each."""
    shape = (batch, config.num_tokens, config.kv_heads, config.head_dim)

    def pair(*lead: int):
        return tuple(jnp.zeros((*lead, *shape), config.dtype) for _ in "kv")

    return pair(config.depth) if config.scan else [pair() for _ in range(config.depth)]


def extend_cache(cache: LayerCache, new: LayerCache, start: Int[Array, ""] | int) -> LayerCache:
    """The cache with the keys and values [..., T, K, h] of new positions written at `start`."""

    def write(past, part):
        return jax.lax.dynamic_update_slice_in_dim(past, part.astype(past.dtype), start, axis=-3)

    return jax.tree.map(write, cache, new)
