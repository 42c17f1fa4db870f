"""Files that are written whole or not at all, and the lock on a workdir."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from detailflow_jax.runtime.errors import ConfigError, FileError, UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path to write to, beside `path`; it becomes `path` when the block ends well.

    So a file is at every moment absent, the old one or the new one, also after a power cut. A
    process that is killed leaves the temporary file, see `remove_partial`.

    Raises:
        FileError: the folder is missing or cannot be written, or the disk is full.
    """
    path, temporary = pathlib.Path(path), None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        os.close(descriptor)
        temporary = pathlib.Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's files are for their owner only.
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise FileError(f"cannot write {path}: {error}") from error
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """As `atomic_path`, an empty folder to fill; a folder that is at `path` is replaced whole."""
    path, made = pathlib.Path(path), []
    try:
        for _ in range(2):
            name = tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent)
            made.append(pathlib.Path(name))
        new, old = made
        yield new
        new.chmod(0o755)  # mkdtemp's folders are for their owner only.
        for inside in (*new.rglob("*"), new):
            sync_folder(inside)
        if replaced := path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if replaced:
                made.remove(old)  # Until it is back in its place, it is the only copy.
                os.replace(old, path)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise FileError(f"cannot write {path}: {error}") from error
    finally:
        for left in made:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """As `atomic_path`, an open file to write to and read from."""
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        yield file


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file as `atomic_path` does, for what fits into memory."""
    with atomic_file(path) as file:
        file.write(content)


def remove_partial(folder: str | os.PathLike, name: str = "*") -> None:
    """Removes the temporary files that killed processes left of files `name`, a glob pattern."""
    for left in pathlib.Path(folder).glob(f".{name}.partial-*"):
        left.unlink(missing_ok=True)


def sync_folder(folder: str | os.PathLike) -> None:
    """Makes the names in a folder, or the content of a file, safe on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Locks a workdir against other processes; makes it if it is missing.

    The lock ends with the process, however that ends.

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
