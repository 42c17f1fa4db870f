"""The command `detailflow generate` as a module; see `inference.generate`."""

from detailflow_jax import cli

if __name__ == "__main__":
    cli.run("generate")
