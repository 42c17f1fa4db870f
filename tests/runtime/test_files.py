"""Files are written whole, also where the file system can do little."""

import errno
import json
import os

import pytest

import toy_task
from detailflow_jax.runtime import files, workdir
from detailflow_jax.runtime.errors import ConfigError, FileError


def unable(number):
    def call(*args, **options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("missing", ["chmod", "link", "symlink", "fchmod", "chown"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_mounts_without_permissions_or_links(tmp_path, monkeypatch, missing, number):
    monkeypatch.setattr(os, missing, unable(number))
    for content in (b"old", b"new"):
        files.write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.EACCES, errno.ENOTSUP])
def test_mounts_that_do_not_rename_over_a_file(tmp_path, monkeypatch, number):
    rename = os.rename

    def replace(source, target):
        if os.path.exists(target):
            unable(number)()
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for content in (b"old", b"new"):
        files.write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_mounts_that_cannot_sync(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", unable(number))
    files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call, number):
    files.write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, call, unable(number))
    with pytest.raises(FileError, match="cannot write"):
        files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("file", "file/a/b"):
        with pytest.raises(ConfigError, match=r"cannot write to .*/file is no folder"):
            files.check_folder(tmp_path / name)
        with pytest.raises(ConfigError, match="is no folder"):
            files.make_folder(tmp_path / name)
    files.check_folder(tmp_path / "a" / "b")
    files.check_folder("a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="is not writable"):
        files.check_folder(tmp_path / "a")


def test_new_files_have_the_permissions_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_workdir_without_locks_can_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.fcntl, "lockf", unable(errno.ENOLCK))
    with workdir.hold_workdir(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


@pytest.mark.slow
def test_a_whole_run_on_a_mount_that_can_do_little(tmp_path, monkeypatch):
    rename = os.rename

    def careful(source, target, **options):
        if os.path.isfile(target):
            unable(errno.EEXIST)()
        rename(source, target)

    for name in ("chmod", "fchmod", "link", "symlink", "chown", "utime"):
        monkeypatch.setattr(os, name, unable(errno.EPERM))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, careful)
    monkeypatch.setattr(workdir.fcntl, "lockf", unable(errno.ENOTSUP))
    config = toy_task.get_config()
    config.update(total_steps=4, checkpoint_every=2, tensorboard=False)
    toy_task.run(config, tmp_path / "run")
    config.total_steps = 6
    toy_task.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
