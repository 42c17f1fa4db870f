"""Copies of a bucket's files on this machine, for readers that know disks only.

They stay in `DETAILFLOW_COPIES`, default `DEFAULT_FOLDER`, and are used again by the next run. All
processes of a machine share them.
"""

import concurrent.futures
import fcntl
import hashlib
import os
import pathlib
import shutil
from collections.abc import Mapping

from absl import logging
from tqdm import tqdm

from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError, NotFoundError

VARIABLE, DEFAULT_FOLDER = "DETAILFLOW_COPIES", "~/.cache/detailflow_jax/copies"
_AT_ONCE = 8


def copy_here(folder: str, sizes: Mapping[str, int], version: str) -> str:
    """Returns a folder of this machine that holds files of a folder in a bucket.

    Args:
        folder: in the bucket.
        sizes: name of each file -> its bytes.
        version: of the content; another one gets copies of its own.

    Raises:
        NotFoundError: a file is missing.
        ConfigError: a file has another size, or there is too little room.
        BucketError: the bucket does not answer.
    """
    key = hashlib.sha256(f"{folder}\t{version}".encode()).hexdigest()[:20]
    target = files.local_path(os.environ.get(VARIABLE) or DEFAULT_FOLDER, VARIABLE) / key
    files.make_folder(target)
    with (target / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        missing = {name: size for name, size in sizes.items() if not _is_there(target / name, size)}
        if missing:
            _copy(folder, target, missing)
    return os.fspath(target)


def _is_there(file: pathlib.Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size


def _copy(folder: str, target: pathlib.Path, sizes: Mapping[str, int]) -> None:
    total, free = sum(sizes.values()), shutil.disk_usage(target).free
    if total > free:
        raise ConfigError(
            f"the copies of {folder} take {total / 1e9:.1f} GB, {target} has {free / 1e9:.1f} GB "
            f"left: set {VARIABLE} to a folder on a larger disk"
        )
    logging.info("copying %d files, %.2f GB, of %s to %s", len(sizes), total / 1e9, folder, target)
    files.remove_partial(target)

    def copy(name: str) -> int:
        place = files.address(f"{folder}/{name}")
        with files.atomic_path(target / name) as temporary:
            try:
                with files.reaching(place, "read"):
                    files.file_system(place).get_file(place, os.fspath(temporary))
            except FileNotFoundError as error:
                raise NotFoundError(f"{place} is missing") from error
            if (found := temporary.stat().st_size) != sizes[name]:
                raise ConfigError(f"{place} has {found} bytes, expected {sizes[name]}")
        return sizes[name]

    bar = tqdm(total=total, unit="B", unit_scale=True, desc="copy", leave=False, disable=None)
    with bar, concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for size in pool.map(copy, sizes):
                bar.update(size)
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
