"""The command `detailflow compile-pod` as a module; see `pod.command`."""

from detailflow_jax import cli

if __name__ == "__main__":
    cli.run("compile-pod")
