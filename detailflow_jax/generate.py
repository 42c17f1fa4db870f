"""The command `python -m detailflow_jax.generate`; see `inference.generate`."""

from detailflow_jax.inference.generate import main
from detailflow_jax.runtime import distributed

if __name__ == "__main__":
    distributed.leave(main())
