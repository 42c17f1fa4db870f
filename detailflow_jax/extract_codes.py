"""The command `detailflow extract-codes` as a module; see `inference.extract_codes`."""

from detailflow_jax import cli

if __name__ == "__main__":
    cli.run("extract-codes")
