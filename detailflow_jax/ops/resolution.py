"""The resolution map R(n): the image size that n tokens stand for (the paper's mapping)."""

import dataclasses
import functools

import numpy as np


def describe_counts(num_tokens: int, group_size: int, causal_num: int) -> str:
    """The valid token counts in words, for error messages."""
    groups = f"multiples of {group_size} up to {num_tokens}"
    return f"1..{causal_num}, then {groups}" if causal_num else groups


@dataclasses.dataclass(frozen=True)
class ResolutionMap:
    """Token counts and the resolutions they stand for.

    R(n) = R - (R - 1) / (N - 1)^a * (N - n)^a, truncated and clamped to [1, R]. The decoded size is
    R(n) rounded up to a multiple of the patch size (the paper says nearest; the published code
    rounds up).

    Attributes:
      image_size: R, the full resolution in pixels.
      num_tokens: N.
      group_size: g; counts above `causal_num` come in multiples of g.
      causal_num: c, the tokens generated one by one; every count up to c is valid.
      patch_size: of the decoder, in pixels.
      power: a, the exponent.
    """

    image_size: int
    num_tokens: int
    group_size: int
    causal_num: int
    patch_size: int
    power: float = 1.5

    @functools.cached_property
    def token_counts(self) -> tuple[int, ...]:
        """Every valid n, ascending: 1..c, then multiples of g."""
        later = range(self.group_size, self.num_tokens + 1, self.group_size)
        return (*range(1, self.causal_num + 1), *(n for n in later if n > self.causal_num))

    def resolution(self, num_tokens: int) -> int:
        """R(n) in pixels, 1..R: the size of the degraded training target."""
        self.check(num_tokens)
        full, last = self.image_size, self.num_tokens
        if last == 1:
            return full
        span = (full - 1) / (last - 1) ** self.power
        return min(max(int(full - span * (last - num_tokens) ** self.power), 1), full)

    def decoded_size(self, num_tokens: int) -> int:
        """The side in pixels of the image that n tokens decode to."""
        return -(-self.resolution(num_tokens) // self.patch_size) * self.patch_size

    def best_count(self, size: int) -> int:
        """The inverse map: among the counts that decode to `size`, the one with the closest R(n).

        Raises:
          ValueError: if no count decodes to `size`.
        """
        counts = [n for n in self.token_counts if self.decoded_size(n) == size]
        if not counts:
            sizes = sorted({self.decoded_size(n) for n in self.token_counts})
            raise ValueError(f"no token count decodes to {size} px; possible sizes: {sizes}")
        return min(reversed(counts), key=lambda n: abs(self.resolution(n) - size))

    def check(self, num_tokens: int) -> None:
        """Raises ValueError, listing the valid counts, if n is not one of them."""
        if num_tokens not in self.token_counts:
            raise ValueError(
                f"num_tokens={num_tokens} is not valid for this model; valid counts are "
                + describe_counts(self.num_tokens, self.group_size, self.causal_num)
            )

    def round_up(self, num_tokens: int) -> int:
        """The smallest valid count >= `num_tokens`."""
        return next(n for n in self.token_counts if n >= num_tokens)

    def draw_count(
        self, rng: np.random.Generator, full_probability: float = 0.8, most: int | None = None
    ) -> int:
        """A random token count for coarse-to-fine training.

        It is `most` with probability `full_probability`, else U[1, most - g] rounded up to a valid
        count.

        Args:
          rng: source of the draw.
          full_probability: of all tokens.
          most: how many tokens encode the image: fewer than N for a smaller image; None: N.
        """
        most = self.num_tokens if most is None else most
        if rng.random() < full_probability or most <= self.group_size:
            return most
        return self.round_up(int(rng.integers(1, most - self.group_size + 1)))
