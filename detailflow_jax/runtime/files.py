"""Files that are written whole or not at all, and the lock on a workdir."""

import contextlib
import errno
import fcntl
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from detailflow_jax.runtime.errors import ConfigError, FileError, UserError

# What mounts (buckets, Windows shares, FUSE) answer to what they cannot do.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
_UNSUPPORTED |= {errno.EACCES, errno.EEXIST}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path to write to, beside `path`; it becomes `path` when the block ends well.

    So a file is at every moment absent, the old one or the new one, also after a power cut. A
    process that is killed leaves the temporary file, see `remove_partial`. It needs no more of the
    file system than to make, rename and remove files.

    Raises:
        FileError: the folder is missing or cannot be written, or the disk is full.
    """
    path = pathlib.Path(path)
    temporary = _partial(path)
    try:
        temporary.open("xb").close()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # Some libraries make files for their owner only.
            with contextlib.suppress(OSError):
                temporary.chmod(mode)
        sync(temporary)
        replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise FileError(f"cannot write {path}: {error}") from error
        raise


def replace(new: str | os.PathLike, path: str | os.PathLike) -> None:
    """Renames `new` to `path`, over an existing file, which some mounts allow only once removed."""
    try:
        os.replace(new, path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not pathlib.Path(path).is_file():
            raise
        os.unlink(path)
        os.rename(new, path)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """As `atomic_path`, an empty folder to fill; a folder that is at `path` is replaced whole."""
    path = pathlib.Path(path)
    new, old = _partial(path), _partial(path)
    made = [new]
    try:
        new.mkdir()
        yield new
        for inside in (*new.rglob("*"), new):
            sync(inside)
        if replaced := path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if replaced:
                os.replace(old, path)
            raise
        made.append(old)  # Not before: until then it may be the only copy.
        sync(path.parent)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise FileError(f"cannot write {path}: {error}") from error
    finally:
        for left in made:
            shutil.rmtree(left, ignore_errors=True)


def _partial(path: pathlib.Path) -> pathlib.Path:
    """A name beside `path` that is not taken."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


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


def sync(path: str | os.PathLike) -> None:
    """Makes a file, or the names in a folder, safe on the disk if the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


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
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    f"another process is at work in {workdir}: stop it, or take another workdir"
                ) from error
            # Some network file systems have no locks.
            logging.warning("%s cannot be locked: %s", workdir, error)
        yield
