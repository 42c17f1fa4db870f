"""The command `python -m detailflow_jax.extract_latents`; see `inference.extract_latents`."""

from detailflow_jax.inference.extract_latents import main
from detailflow_jax.runtime import distributed

if __name__ == "__main__":
    distributed.leave(main())
