"""The command `python -m detailflow_jax.weights`; see `runtime.weights`."""

import sys

from detailflow_jax.runtime.weights import main

if __name__ == "__main__":
    sys.exit(main())
