"""What is tried again, and what is not."""

import errno
import os

import pytest

from detailflow_jax.data.images import read_file
from detailflow_jax.runtime import retry
from detailflow_jax.runtime.errors import BucketError, ConfigError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.01, 0.01))


def test_a_disk_that_fails_once_is_read_again(tmp_path, monkeypatch, caplog):
    image, link = tmp_path / "image", tmp_path / "link"
    image.write_bytes(b"pixels")
    link.symlink_to("/proc/self/mem")  # EIO, by a real disk.

    def mend(seconds):
        link.unlink()
        link.symlink_to(image)

    monkeypatch.setattr(retry.time, "sleep", mend)
    assert read_file(link) == b"pixels"
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == f"cannot read {link}: [Errno 5] Input/output error; again in 0.01 s"


def failing(error: Exception) -> int:
    """How often a read that always fails is tried."""
    tries = 0

    def read():
        nonlocal tries
        tries += 1
        raise error

    with pytest.raises(type(error)):
        retry.read_again(read, "it")
    return tries


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE)),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(),
        BucketError("it answers 503"),
        RuntimeError("pread() failed: Input/output error [INTERNAL]"),
    ],
)
def test_what_may_pass_is_tried_four_times(error):
    assert failing(error) == 4


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError(errno.ENOENT, "not there"), PermissionError(errno.EACCES, "denied")),
        *(ConfigError("no such bucket"), ValueError("broken"), RuntimeError("checksum is wrong")),
    ],
)
def test_what_stays_is_not(error):
    assert failing(error) == 1
