"""One door for paths: local files and objects in a bucket, written whole or not at all.

    files.path("~/runs/tok/")        a `pathlib.Path`
    files.path("gs://bucket/runs")   an `epath.Path`, with much the same methods

Every path that a user gives goes through `path`, or through `local_path` where only this machine's
disks will do. The functions below take either kind. A bucket knows neither renaming nor appending:
a file for it is made on this machine, and an upload shows it whole.

Buckets are reached through fsspec. Without being told, etils would use TensorFlow where that is
installed: another set of credentials and time limits, depending on a package that has nothing to do
with it. gcsfs finds a TPU VM's own account by itself, as TensorStore and Orbax do.
"""

import contextlib
import errno
import functools
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from etils import epath

from detailflow_jax.runtime import extras
from detailflow_jax.runtime.errors import (
    BucketError,
    ConfigError,
    FileError,
    NotFoundError,
    UserError,
)

os.environ.setdefault("EPATH_USE_TF", "false")  # Orbax, TFDS and JAX's cache use etils as well.

DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}
"""Scheme -> the package that reaches it."""
_REMOTE = tuple(f"{scheme}://" for scheme in DRIVERS)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)
"""Scheme, slashes, and the rest."""
# Of a local path: nobody means a folder `gs:`.
_MISTYPED = re.compile(rf"^\s*({'|'.join(DRIVERS)}):|/({'|'.join(DRIVERS)}):/", re.IGNORECASE)

_DRIVER_MODULES = ("gcsfs", "aiohttp", "google", "requests")
# Of TensorStore, which has no exception types for them.
_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED)\b"
)

# The same of gcsfs, and of ArrayRecord, which has none either.
_REFUSED = re.compile(r"^Forbidden|Permanent error.*\"code\": 40[13]")

PathLike = str | os.PathLike[str]

# What mounts (buckets, Windows shares, FUSE) answer to what they cannot do.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
_UNSUPPORTED |= {errno.EACCES, errno.EEXIST}

# -------------------------------------------------------------------------------- which place it is


def path(place: PathLike) -> pathlib.Path | epath.Path:
    """Returns the path that a user named, with `~` expanded and without a slash at its end.

    Raises:
        ConfigError: empty, or an address that is not one of a bucket.
        MissingExtra: the package that reaches the bucket is not installed.
    """
    text = os.fspath(place)
    if not text:
        raise ConfigError("an empty path: expected a local path or gs://BUCKET/PATH")
    address = _ADDRESS.fullmatch(text)
    if not address and not _MISTYPED.search(text):
        return pathlib.Path(os.path.expanduser(text))
    scheme, slashes, rest = address.groups() if address else ("", "", "")
    if scheme not in DRIVERS or slashes != "//" or not rest.strip("/"):
        raise ConfigError(f"{text}: expected a local path or an address such as gs://BUCKET/PATH")
    _connect(scheme)
    return epath.Path(text.rstrip("/"))


def address(place: PathLike) -> str:
    """Returns `path` as text: an object has one name only, but `gs://b//run` would be another's."""
    return os.fspath(path(place))


def local_path(place: PathLike, what: str) -> pathlib.Path:
    """Returns a path of this machine's disks, as `path` does.

    Args:
        place: as the user named it.
        what: begins the error, such as "--out".

    Raises:
        ConfigError: an address.
    """
    if _ADDRESS.fullmatch(os.fspath(place)):
        raise ConfigError(
            f"{what}={os.fspath(place)}: expected a path on this machine; write there, then copy, "
            "or mount the bucket (gcsfuse)"
        )
    return pathlib.Path(path(place))


def is_remote(place: PathLike) -> bool:
    """Returns whether a path is one of a bucket."""
    return os.fspath(place).startswith(_REMOTE)


@functools.cache
def _connect(scheme: str) -> Any:
    """The file system of a scheme; listings are not kept, for other processes write there too."""
    extras.require(DRIVERS[scheme])
    import fsspec

    # Also for the objects that etils makes.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    return fsspec.filesystem(scheme)


def file_system(place: PathLike) -> Any:
    """Returns the fsspec file system of a path in a bucket."""
    return _connect(os.fspath(place).partition("://")[0])


@contextlib.contextmanager
def reaching(place: PathLike, doing: str = "reach") -> Iterator[None]:
    """Raises what a bucket's driver raises as an error of this project; local errors stay.

    Raises:
        FileNotFoundError: there is no such object, or no such bucket.
        ConfigError: the bucket refuses: no credentials, or no permission.
        BucketError: everything else; trying again may help.
    """
    try:
        yield
    except Exception as error:  # Every driver has errors of its own, without a common base.
        if not is_remote(place) or isinstance(error, (UserError, FileNotFoundError)):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        text = f"cannot {doing} {os.fspath(place)}: {reason}"
        if _is_refusal(error):
            raise ConfigError(
                f"{text} (which account does this machine use, and may it read and write there?)"
            ) from error
        raise BucketError(f"{text} ({type(error).__name__}; it was tried several times)") from error


def is_unreachable(error: BaseException | None) -> bool:
    """Returns whether a bucket did not answer or refused, rather than held something broken."""
    while error is not None:
        driver = type(error).__module__.partition(".")[0] in _DRIVER_MODULES
        network = driver or isinstance(error, ConnectionError | TimeoutError)
        if network or _is_refusal(error) or _STATUS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_refusal(error: BaseException) -> bool:
    code = getattr(error, "code", None) or getattr(error, "status", None)
    return (
        isinstance(error, PermissionError)
        or code in (401, 403, "401", "403")
        or _REFUSED.search(str(error)) is not None
        or type(error).__name__ == "DefaultCredentialsError"
    )


# -------------------------------------------------------------------------------- looking, reading


def exists(place: PathLike) -> bool:
    """Returns whether a file or folder is there; raises as `reaching`, and as `is_dir`."""
    with _looking(place):
        return path(place).exists()


def is_dir(place: PathLike) -> bool:
    """Returns whether a folder is there; in a bucket, whether names begin so.

    Raises:
        ConfigError: a name that is too long, or a folder above it that may not be entered.
    """
    with _looking(place):
        return path(place).is_dir()


@contextlib.contextmanager
def _looking(place: PathLike) -> Iterator[None]:
    try:
        with reaching(place):
            yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM):
            raise
        raise ConfigError(f"cannot look at {os.fspath(place):.200}: {error.strerror}") from error


def size(place: PathLike) -> int:
    """Returns the bytes of a file; raises FileNotFoundError if it is not there."""
    if not is_remote(place):
        return path(place).stat().st_size
    with reaching(place):
        return file_system(place).info(address(place))["size"]


def sizes(folder: PathLike) -> dict[str, int]:
    """Returns the bytes of every object below a folder in a bucket, by its name from there on."""
    place = address(folder)
    with reaching(place, "list"):
        found = file_system(place).find(place, detail=True)
    start = len(place.partition("://")[2]) + 1
    return {name[start:]: entry["size"] for name, entry in found.items()}


def names(folder: PathLike) -> list[str]:
    """Returns the sorted names in a folder; empty if it is not there."""
    with reaching(folder):
        found = path(folder)
        return sorted(inside.name for inside in found.iterdir()) if found.is_dir() else []


def open_file(place: PathLike) -> BinaryIO:
    """Opens a file to read from, at any position; in a bucket, reading raises as `reaching`.

    Raises:
        FileNotFoundError: it is not there.
        ConfigError: a pipe or a device.
    """
    if is_remote(place):
        return io.BufferedReader(_RemoteFile(place), 1 << 20)
    return open(_regular(place), "rb")


def _regular(place: PathLike) -> pathlib.Path:
    """The path of a file that does not wait for a writer, and that ends."""
    found = pathlib.Path(path(place))
    mode = found.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # To open a folder says that it is one.
        raise ConfigError(f"{found} is a pipe, socket or device: expected a regular file")
    return found


class _RemoteFile(io.RawIOBase):
    """A file in a bucket, which raises as `reaching`."""

    def __init__(self, place: PathLike):
        self._place = place
        with reaching(place):
            self._file = file_system(place).open(address(place))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with reaching(self._place, "read"):
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_bytes(place: PathLike, pipes: bool = False) -> bytes:
    """Returns the content of a file.

    Args:
        place: the file.
        pipes: also wait for what another program writes into a pipe.

    Raises:
        FileNotFoundError: it is not there.
        ConfigError: a pipe or a device, unless `pipes`.
    """
    if not is_remote(place):
        return (path(place) if pipes else _regular(place)).read_bytes()
    with reaching(place, "read"):
        return file_system(place).cat_file(address(place))


def read_json(place: PathLike) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_bytes(place))
    except FileNotFoundError as error:
        raise NotFoundError(f"{os.fspath(place)} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"cannot read {os.fspath(place)}: {error}; expected JSON") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{os.fspath(place)} holds {type(found).__name__}, expected a JSON object"
        )
    return found


def read_json_lines(place: PathLike) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file, one per line, up to one that was not written whole.

    Raises FileNotFoundError if the file is not there.
    """
    found = []
    for line in read_bytes(place).splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # Its writer was killed.
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def make_folder(folder: PathLike) -> None:
    """Makes a folder; in a bucket, which has none, makes sure that one may write there.

    Raises:
        FileError: it cannot be made.
        ConfigError, BucketError: as `check_folder` and `reaching`, and if there is no such bucket.
    """
    if is_remote(folder):
        probe = os.path.join(folder, f".writable-{secrets.token_hex(4)}")
        write_atomically(probe, b"")
        with contextlib.suppress(ConfigError):  # Some accounts may write, but not remove.
            remove(probe)
        return
    check_folder(folder)
    try:
        path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {os.fspath(folder)}: {error}") from error


def check_folder(folder: PathLike) -> None:
    """Raises ConfigError if a folder of a disk cannot be made or written to; makes nothing."""
    if is_remote(folder):
        return
    there = path(folder)
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"cannot write to {os.fspath(folder)}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to {os.fspath(folder)}: {there} is not writable")


def remove(place: PathLike) -> None:
    """Removes a file, if it is there."""
    if not is_remote(place):
        path(place).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), reaching(place, "remove"):
        file_system(place).rm_file(address(place))  # etils takes `[1]` in a name for a pattern.


# ----------------------------------------------------------------------------------- writing whole


@contextlib.contextmanager
def atomic_path(place: PathLike) -> Iterator[pathlib.Path]:
    """A temporary path to write to, beside `place`; it becomes `place` when the block ends well.

    So a file is at every moment absent, the old one or the new one, also after a power cut. A
    process that is killed leaves the temporary file, see `remove_partial`. It needs no more of the
    file system than to make, rename and remove files. Of a file in a bucket, the temporary one is
    on this machine.

    Raises:
        FileError: the folder is missing or cannot be written, or the disk is full.
        ConfigError, BucketError: as `reaching`.
    """
    if is_remote(place):
        with tempfile.TemporaryDirectory(prefix="detailflow-") as folder:
            temporary = pathlib.Path(folder) / "file"
            temporary.touch()
            yield temporary
            with _uploading(place):
                file_system(place).put_file(os.fspath(temporary), address(place))
        return
    target = pathlib.Path(place).expanduser()
    temporary = _partial(target)
    try:
        temporary.open("xb").close()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # Some libraries make files for their owner only.
            with contextlib.suppress(OSError):
                temporary.chmod(mode)
        sync(temporary)
        replace(temporary, target)
        sync(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise FileError(f"cannot write {target}: {error}") from error
        raise


@contextlib.contextmanager
def _uploading(place: PathLike) -> Iterator[None]:
    try:
        with reaching(place, "write"):
            yield
    except FileNotFoundError as error:
        raise ConfigError(f"cannot write {os.fspath(place)}: there is no such bucket") from error


def replace(new: PathLike, target: PathLike) -> None:
    """Renames `new` to `target`, over a file, which some mounts allow only once it is removed."""
    try:
        os.replace(new, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not pathlib.Path(target).is_file():
            raise
        os.unlink(target)
        os.rename(new, target)


@contextlib.contextmanager
def atomic_folder(place: PathLike) -> Iterator[pathlib.Path]:
    """As `atomic_path`, an empty local folder to fill; one that is at `place` is replaced whole."""
    target = local_path(place, "folder")
    new, old = _partial(target), _partial(target)
    made = [new]
    try:
        new.mkdir()
        yield new
        for inside in (*new.rglob("*"), new):
            sync(inside)
        if replaced := target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            if replaced:
                os.replace(old, target)
            raise
        made.append(old)  # Not before: until then it may be the only copy.
        sync(target.parent)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise FileError(f"cannot write {target}: {error}") from error
    finally:
        for left in made:
            shutil.rmtree(left, ignore_errors=True)


def _partial(target: pathlib.Path) -> pathlib.Path:
    """A name beside `target` that is not taken."""
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")


@contextlib.contextmanager
def atomic_file(place: PathLike) -> Iterator[BinaryIO]:
    """As `atomic_path`, an open file to write to and read from."""
    with atomic_path(place) as temporary, temporary.open("w+b") as file:
        yield file


def write_atomically(place: PathLike, content: bytes) -> None:
    """Writes a file as `atomic_path` does, for what fits into memory."""
    write_all({place: content})


def write_all(contents: Mapping[PathLike, bytes]) -> None:
    """Writes several files, each atomically; those of one bucket all at once."""
    for place, content in contents.items():
        if not is_remote(place):
            with atomic_file(place) as file:
                file.write(content)
    remote = {address(x): content for x, content in contents.items() if is_remote(x)}
    if remote:
        first = next(iter(remote))
        with _uploading(first):
            file_system(first).pipe(remote)


def remove_partial(folder: PathLike, name: str = "*") -> None:
    """Removes the temporary files that killed processes left of files `name`, a glob pattern."""
    if is_remote(folder):
        return  # What was not uploaded whole is not there.
    for left in pathlib.Path(folder).glob(f".{name}.partial-*"):
        left.unlink(missing_ok=True)


def sync(place: PathLike) -> None:
    """Makes a file, or the names in a folder, safe on the disk if the file system can do that."""
    try:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
