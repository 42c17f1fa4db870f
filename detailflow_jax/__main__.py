"""`python -m detailflow_jax`, the same as the command `detailflow`; see `cli`."""

from detailflow_jax import cli

if __name__ == "__main__":
    cli.main()
