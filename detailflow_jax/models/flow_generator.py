"""The generator with a flow head: the tokens of a group are drawn jointly, as vectors.

The transformer of `models/generator.py` gives one semantic vector per position. The head, which is
that of FlowAR, carries noise to the code vectors of one group. Its positions see each other, so the
tokens of a group fit together; logits would draw each on its own. Code vectors are the entries of
the tokenizer's codebook on the unit sphere, times sqrt(d): their numbers have about unit variance,
as the noise has. A sample is the code nearest to what the flow ends at.

Shapes: B batch, T positions, N tokens, V codes, d code dimension, D width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from detailflow_jax.models import layers
from detailflow_jax.models.flow_head import FlowHead
from detailflow_jax.models.generator import Generator, GeneratorConfig, Labels, Transformer
from detailflow_jax.models.layers import Tokens
from detailflow_jax.ops import Array, quantization

Vectors = Float[Array, "B T d"]
FIXED = ("codebook",)
"""Parameters that are given and never trained: the tokenizer's."""


class FlowGenerator(Transformer):
    """Semantics from codes and labels, and velocities from semantics."""

    def setup(self):
        super().setup()
        c = self.config
        init = jax.nn.initializers.normal(1.0)
        self.codebook = layers.param(
            self, "codebook", init, ("vocab", "code"), (c.codebook_size, c.code_dim)
        )
        self.vector_in = layers.dense(c.width, ("code", "embed"), dtype=jnp.dtype(c.dtype))
        self.flow_head = FlowHead(c.flow_head)

    def vectors(self, codes: Int[Array, "B T"]) -> Vectors:
        """The vectors that codes stand for, of length sqrt(d); float32."""
        return self.scaled(jnp.take(self.codebook, codes, axis=0))

    def scaled(self, x: Vectors) -> Vectors:
        """Vectors at the length of code vectors, sqrt(d); float32."""
        return quantization.normalize(x) * np.float32(np.sqrt(self.config.code_dim))

    def nearest(self, x: Vectors) -> Int[Array, "B T"]:
        """The codes nearest to vectors of any length, int32."""
        codebook = quantization.normalize(self.codebook)
        distances = quantization.code_distances(quantization.normalize(x), codebook)
        return quantization.nearest_codes(distances)

    def embed_codes(self, codes: Int[Array, "B T"]) -> Tokens:
        """Embedded codes."""
        return self.embed_vectors(self.vectors(codes))

    def embed_vectors(self, x: Vectors) -> Tokens:
        """Embedded vectors of length sqrt(d)."""
        return self.vector_in(x.astype(self.config.dtype))

    def read_out(self, x: Tokens) -> Tokens:
        """The semantics, of the blocks' output; float32."""
        return self.final_norm(x)

    def velocity(
        self,
        x: Vectors,
        time: Float[Array, " B"] | Float[Array, "B T"],
        semantics: Tokens,
        start: Int[Array, ""] | int | None = None,
    ) -> Vectors:
        """The head's velocity at the tokens of the draw that begins at `start`.

        Without `start`, at all N tokens; then those of different draws do not see each other
        (`config.draws`).
        """
        rope = self.config.flow_head_rope()
        if start is None:
            return self.flow_head(x, time, semantics, rope=rope, segments=self.config.draws())
        rope = jax.lax.dynamic_slice_in_dim(jnp.asarray(rope), start, x.shape[1])
        return self.flow_head(x, time, semantics, rope=rope)

    def __call__(
        self,
        codes: Int[Array, "B n"],
        labels: Labels,
        x: Float[Array, "B N d"],
        time: Float[Array, "B N"],
    ) -> Float[Array, "B N d"]:
        """Velocities of all tokens at noisy vectors x, under teacher forcing; float32.

        Args:
          codes, labels: see `Transformer.run`.
          x: noisy vectors; those at position p are of z_{p+1}.
          time: 1 is noise, 0 is data; the same within a draw.
        """
        return self.velocity(x, time, self.read_out(self.run(codes, labels)))


def make_generator(config: GeneratorConfig) -> Generator | FlowGenerator:
    """The network of a configuration."""
    return FlowGenerator(config) if config.head == "flow" else Generator(config)


def example(config: GeneratorConfig) -> Sequence[jax.Array]:
    """Arguments that the network is initialised with."""
    count = config.num_tokens
    rows = jnp.zeros((1, count), jnp.int32), jnp.zeros((1,), jnp.int32)
    if config.head == "flow":
        return *rows, jnp.zeros((1, count, config.code_dim)), jnp.zeros((1, count))
    return rows
