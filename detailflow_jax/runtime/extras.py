"""Packages that a base install leaves out: imported where they are used, named where missing."""

import importlib.util
import pathlib
import types

from detailflow_jax.runtime.errors import UserError

EXTRAS = {
    "tensorflow": "tfds",
    "tensorflow_datasets": "tfds",
    "mlxtend": "demo",
    "skimage": "demo",
    "sklearn": "demo",
    "matplotlib": "evaluate",
    "torch": "torch",
    "gcsfs": "gcs",
    "s3fs": "s3",
    "wandb": "wandb",
    "gradio": "app",
}
"""Top-level module -> the extra in setup.py that brings it."""


class MissingExtra(UserError, ImportError):
    """A package of an extra is not installed; the text says how to install it."""


def folder(package: str) -> pathlib.Path:
    """Returns the folder of an installed package, one of `EXTRAS`, without importing it.

    Raises:
      MissingExtra: it is not installed; the text names the extra.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package)
    return pathlib.Path(spec.submodule_search_locations[0])


def require(module: str) -> types.ModuleType:
    """Returns the imported module, one of `EXTRAS` or a submodule of it.

    Args:
      module: its full name, such as "matplotlib.figure".

    Raises:
      MissingExtra: it is not installed; the text names the extra. An error inside of an installed
        package is raised as it is.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise _missing(package) from error


def _missing(package: str) -> MissingExtra:
    extra = EXTRAS[package]
    return MissingExtra(
        f"this needs the package {package!r}, which is not installed: "
        f"pip install 'detailflow_jax[{extra}]' (in a clone: pip install -e '.[{extra}]')"
    )
