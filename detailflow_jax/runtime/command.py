"""The name under which a command was started."""

import sys

_PACKAGE = "detailflow_jax"


def program_name(command: str) -> str:
    """Returns what the help shows as the program.

    Args:
      command: its name as a subcommand of `detailflow`, such as "train".

    Returns:
      "python -m detailflow_jax.train" if Python was started so, else "detailflow train".
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    if module.startswith(f"{_PACKAGE}.") and module != f"{_PACKAGE}.cli":
        return f"python -m {module}"
    return f"detailflow {command}"
