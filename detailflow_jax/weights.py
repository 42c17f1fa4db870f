"""The command `detailflow weights` as a module; see `runtime.weights`."""

from detailflow_jax import cli

if __name__ == "__main__":
    cli.run("weights")
