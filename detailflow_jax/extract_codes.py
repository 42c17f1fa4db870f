"""The command `python -m detailflow_jax.extract_codes`; see `inference.extract_codes`."""

from detailflow_jax.inference.extract_codes import main
from detailflow_jax.runtime import distributed

if __name__ == "__main__":
    distributed.leave(main())
