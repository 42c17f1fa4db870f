"""Pure functions on arrays: every formula of the papers lives here, once. No modules, no config."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
"""What formulas and networks take: outside of a compiled program NumPy arrays will do as well."""
