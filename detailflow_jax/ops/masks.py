"""Attention masks of DetailFlow. True means "may be seen"; rows are queries, columns are keys."""

import numpy as np
from jaxtyping import Bool


def check_groups(num_tokens: int, group_size: int, causal_num: int) -> None:
    """Raises ValueError unless groups of g tile both the N tokens and the first c of them.

    c = 0 is valid: then not even the first group is causal.
    """
    if group_size < 1 or num_tokens % group_size:
        raise ValueError(f"num_tokens={num_tokens} is not a multiple of group_size={group_size}")
    if not 0 <= causal_num <= num_tokens or causal_num % group_size:
        raise ValueError(
            f"causal_num={causal_num} must be a multiple of group_size={group_size} "
            f"between 0 and num_tokens={num_tokens}"
        )


def group_mask(
    num_tokens: int, group_size: int, causal_num: int
) -> Bool[np.ndarray, "{num_tokens} {num_tokens}"]:
    """The mask that is causal for the first c positions, then bidirectional inside each group.

    A group sees all earlier groups. With c = 0 the first group is bidirectional too. The same rule
    serves the encoder's queries and the generator's positions (the paper's parallel inference).

    Raises:
      ValueError: if the sizes do not fit; see `check_groups`.
    """
    check_groups(num_tokens, group_size, causal_num)
    i, j = np.ogrid[:num_tokens, :num_tokens]
    return np.where(i < causal_num, i >= j, i // group_size >= j // group_size)
