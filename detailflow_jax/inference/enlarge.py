"""Images decoded from a prefix of their tokens, at full size.

Shapes: B images, R their full side, N tokens.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from detailflow_jax.inference import programs


def decode_enlarged(
    tokenizer: Any, codes: Int[np.ndarray, "B N"], count: int, batch_size: int = 64
) -> Float32[np.ndarray, "B R R 3"]:
    """Images of the first `count` codes, enlarged to full size."""
    return tokenizer.run(programs.decode_whole, batch_size, codes[:, :count])
