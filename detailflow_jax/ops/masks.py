"""Attention masks of both networks. True means "may be seen"; rows are queries, columns keys."""

import numpy as np


def check_groups(num_tokens: int, group_size: int, causal_num: int) -> None:
    """Raises ValueError unless whole groups of g tile N tokens and the first c of them.

    c = 0 is valid: nothing is causal, the first group included.
    """
    if group_size < 1 or num_tokens % group_size:
        raise ValueError(f"num_tokens={num_tokens} is not a multiple of group_size={group_size}")
    if not 0 <= causal_num <= num_tokens or causal_num % group_size:
        raise ValueError(
            f"causal_num={causal_num} must be a multiple of group_size={group_size} "
            f"between 0 and num_tokens={num_tokens}"
        )


def group_mask(num_tokens: int, group_size: int, causal_num: int) -> np.ndarray:
    """Causal for the first c positions, then bidirectional inside a group, causal across groups.

    With c = 0 the first group is bidirectional too.
    The same rule serves the encoder's queries and the generator's sequence positions
    (the paper's parallel inference). Returns bool [N, N].
    """
    check_groups(num_tokens, group_size, causal_num)
    i, j = np.ogrid[:num_tokens, :num_tokens]
    return np.where(i < causal_num, i >= j, i // group_size >= j // group_size)
