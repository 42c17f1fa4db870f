"""The command `detailflow extract-latents` as a module; see `inference.extract_latents`."""

from detailflow_jax import cli

if __name__ == "__main__":
    cli.run("extract-latents")
