"""The command `python -m detailflow_jax.compile_pod`; see `pod.command`."""

import sys

from detailflow_jax.pod.command import main

if __name__ == "__main__":
    sys.exit(main())
