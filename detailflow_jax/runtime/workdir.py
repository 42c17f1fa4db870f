"""The workdir of a run: held against other jobs, on a disk or in a bucket.

On a disk a lock holds it, which ends with its process. In a bucket an object `.lock` does, which
names its holder and which the holder renews every `RENEW` seconds. A mark that does not change for
`DEAD_AFTER` seconds is that of a dead holder and is taken over; at once if the holder was a process
of this machine that is gone.

What is only ever appended to, the log and the metrics, a bucket cannot take. The files lie in a
folder of this machine, and are uploaded with every checkpoint, every `UPLOAD` seconds, and at the
end.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import BucketError, ConfigError, FileError, UserError

RENEW, DEAD_AFTER, UPLOAD = 10.0, 60.0, 60.0
_SETTLE = 2.0  # Seconds after a take-over: of two that take over together, the later one counts.
_PATTERN = re.compile(r"[*?\[\]]")
_CONTINUED = ("log.txt", "metrics.jsonl", "clock.json", "wandb_id")


class Workdir:
    """A workdir that this process holds, and where its append-only files lie.

    Attributes:
      folder: where to write log, metrics, figures and the like; on a disk the workdir itself.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def upload(self) -> None:
        """Brings the files to where others see them; call it before each checkpoint.

        Raises:
            ConfigError: another job has taken the workdir over.
        """


@contextlib.contextmanager
def open_workdir(place: files.PathLike) -> Iterator[Workdir]:
    """Makes and locks a workdir, and gives a folder for the files that are appended to.

    Only process 0 of a run locks it and writes there.

    Raises:
        ConfigError: another process holds it, or it cannot be made.
        FileError: at the end, what was appended could not be uploaded; it is kept on this machine.
    """
    if files.is_remote(place) and (pattern := _PATTERN.search(os.fspath(place))):
        raise ConfigError(
            f"--workdir={place}: {pattern[0]} stands for a pattern where Orbax removes checkpoints "
            "of a bucket: take a name without any of * ? [ ]"
        )
    if jax.process_index() > 0:
        yield Workdir(pathlib.Path())
    elif not files.is_remote(place):
        with hold_workdir(place):
            yield Workdir(files.local_path(place, "--workdir"))
    elif not os.fspath(place).startswith("gs://"):
        raise ConfigError(f"--workdir={place}: of the buckets only gs:// can hold a workdir")
    else:
        address = files.address(place)
        with _Mark(address) as mark, _Spool(address, mark) as spool:
            yield spool


# ---------------------------------------------------------------------------------------- on a disk


@contextlib.contextmanager
def hold_workdir(workdir: files.PathLike) -> Iterator[None]:
    """Locks a folder on a disk against other processes; makes it if it is missing.

    The lock ends with the process, however that ends.

    Raises:
        ConfigError: another process holds it, or it cannot be made.
    """
    path = files.local_path(workdir, "workdir") / ".lock"
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


# -------------------------------------------------------------------------------------- in a bucket


class _Mark:
    """The object that says who holds a workdir; a context manager."""

    def __init__(self, workdir: str):
        self._workdir, self._path = workdir, os.path.join(workdir, ".lock")
        self._own = _process() | {"token": secrets.token_hex(8), "renewed": 0}
        self.lost = False  # whether another job has taken the workdir over
        self._writing = threading.Lock()

    def __enter__(self):
        before = self._read()
        if before is None:
            self._write_first()
        else:
            self._await_death(before)
            self._write()
            time.sleep(_SETTLE)
        if not self._is_own(now := self._read()):
            raise self._taken(now)
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(UserError), self._writing:
            if self._is_own(self._read()):
                files.remove(self._path)

    def renew(self) -> None:
        """Shows that the holder is alive; notices if another one has taken the workdir over."""
        with self._writing:
            if not self._is_own(now := self._read()):
                self.lost = True
                raise self._taken(now)
            self._own["renewed"] += 1
            self._write()

    def check(self) -> None:
        """Raises ConfigError if another job has taken the workdir over."""
        if self.lost:
            raise self._taken(self._read())

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(files.read_bytes(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"token": "unreadable"}

    def _write(self) -> None:
        files.write_atomically(self._path, json.dumps(self._own).encode())

    def _write_first(self) -> None:
        """Writes the mark only if there is none, which the bucket decides."""
        content = json.dumps(self._own).encode()
        try:
            with files.reaching(self._path, "write"):
                files.file_system(self._path).pipe_file(self._path, content, mode="create")
        except FileNotFoundError as error:
            raise ConfigError(f"{self._workdir}: there is no such bucket") from error
        except FileExistsError:
            pass  # Perhaps by an earlier try of this very request, see below.

    def _is_own(self, mark: dict[str, Any] | None) -> bool:
        return mark is not None and mark.get("token") == self._own["token"]

    def _await_death(self, before: dict[str, Any]) -> None:
        """Returns when the holder is dead or has left; raises ConfigError if it is alive."""
        if _has_ended(before):
            logging.warning("%s was held by a process that is gone", self._workdir)
            return
        logging.warning(
            "%s is marked by %s: waiting up to %.0f s for a sign of life",
            self._workdir,
            _shown(before),
            DEAD_AFTER,
        )
        deadline = time.monotonic() + DEAD_AFTER
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, DEAD_AFTER / 30))
            now = self._read()
            if now is None:
                return
            if now != before:
                raise self._taken(now)

    def _taken(self, mark: dict[str, Any] | None) -> ConfigError:
        return ConfigError(
            f"another process is at work in {self._workdir}, {_shown(mark or {})}: stop it, or "
            "take another workdir"
        )


class _Spool(Workdir):
    """A folder of this machine whose files are uploaded to a workdir; a context manager."""

    def __init__(self, workdir: str, mark: _Mark):
        self._workdir, self._mark = workdir, mark
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._uploading = threading.Lock()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="workdir", daemon=True)
        self._held = contextlib.ExitStack()
        prefix = f"detailflow-{hashlib.sha256(self._workdir.encode()).hexdigest()[:12]}-"
        for left in pathlib.Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            # A killed run leaves its folder. One in use is that of a run under the same address
            # that this one cannot see, such as behind another endpoint.
            with contextlib.suppress(ConfigError), hold_workdir(left):
                shutil.rmtree(left, ignore_errors=True)
        super().__init__(pathlib.Path(tempfile.mkdtemp(prefix=prefix)))

    def __enter__(self):
        self._held.enter_context(hold_workdir(self.folder))
        for name in _CONTINUED:
            with contextlib.suppress(FileNotFoundError):
                content = files.read_bytes(os.path.join(self._workdir, name))
                (self.folder / name).write_bytes(content)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._leave.set()
        self._thread.join()
        self._held.close()
        try:
            self._upload()
        except (UserError, OSError) as failed:
            text = f"{self._workdir} lacks the end of the log and metrics, kept in {self.folder}"
            if error is None:
                raise FileError(f"{text}: {failed}") from failed
            logging.error("%s: %s", text, failed)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def upload(self) -> None:
        """As `Workdir.upload`; a bucket that does not answer is only worth a warning."""
        self._mark.check()
        try:
            self._upload()
        except BucketError as error:
            logging.warning("log and metrics are uploaded with the next checkpoint: %s", error)

    def _upload(self) -> None:
        """Uploads what has changed since the last time."""
        with self._uploading:
            changed, stamps = {}, {}
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder).as_posix()
                if not file.is_file() or file.name.startswith("."):
                    continue
                stat = file.stat()
                stamp = stat.st_size, stat.st_mtime_ns
                if stamp != self._uploaded.get(name):
                    changed[os.path.join(self._workdir, name)] = file.read_bytes()
                    stamps[name] = stamp
            files.write_all(changed)
            self._uploaded |= stamps

    def _keep(self) -> None:
        """Renews the mark and uploads now and then; what fails is tried again."""
        uploaded = time.monotonic()
        while not self._leave.wait(RENEW):
            try:
                self._mark.renew()
                if time.monotonic() - uploaded > UPLOAD:
                    self._upload()
                    uploaded = time.monotonic()
            except (UserError, OSError) as error:
                logging.log(logging.ERROR if self._mark.lost else logging.DEBUG, "%s", error)
                if self._mark.lost:
                    return


def _process() -> dict[str, Any]:
    """What tells this process from all others, also of other machines and containers."""
    own = {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):  # Where there is no /proc.
        own["machine"] = _machine()
        own["started"] = _start_time(os.getpid())
    return own


def _machine() -> str:
    """This boot of this machine, and the process numbers that are seen here."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str:
    """When a living process started; a number that is used again is another process."""
    state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


def _has_ended(mark: dict[str, Any]) -> bool:
    """Whether a mark is that of a process of this machine that is gone."""
    try:
        if mark.get("machine") != _machine() or "started" not in mark:
            return False
        return _start_time(int(mark["pid"])) != mark["started"]
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError):
        return False


def _shown(mark: dict[str, Any]) -> str:
    return f"process {mark.get('pid', '?')} on {mark.get('host', 'an unknown host')}"
