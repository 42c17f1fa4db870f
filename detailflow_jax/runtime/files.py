"""Files that are never half written, and the lock on a workdir."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from detailflow_jax.runtime.errors import ConfigError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file that is, at every moment, absent, the old one or, once written, the new one."""
    path = pathlib.Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner only.
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file as `atomic_file` does, for what fits into memory."""
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def hold_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Within it no other process may hold the same workdir; makes it where there is none.

    The lock goes with the process, however that ends.

    Raises:
        ConfigError: another process holds it, or it cannot be made.
    """
    path = pathlib.Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to the workdir {workdir}: {error}") from error
    with file:
        try:
            # A POSIX lock: unlike flock's, it is not inherited by the data workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(
                f"another process is at work in {workdir}: stop it, or take another workdir"
            ) from error
        except OSError as error:  # Some network file systems have no locks.
            logging.warning("%s cannot be locked: %s", workdir, error)
        yield
