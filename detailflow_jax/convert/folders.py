"""Places where checkpoints lie: a local folder, a bucket, a repository of the Hugging Face hub."""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import BucketError, ConfigError

_HUB = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/@]+))?(?:/(?P<file>.+))?"
)

_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)(?:/(?:resolve|blob)/([^/?]+)/([^?]+))?"
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of files that can be brought to this machine.

    Attributes:
        where: what messages call the folder.
        names: of the files in the folder and in `checkpoints/` under it, sorted.
        fetch: name -> path of the file on this machine; raises `CheckpointError` if it cannot be
            had.
    """

    where: str
    names: Sequence[str]
    fetch: Callable[[str], Path]

    def label(self, name: str) -> str:
        """Returns what messages call one of the files."""
        return _join(self.where, name)


def open_folder(
    path: str | os.PathLike[str], stack: contextlib.ExitStack
) -> tuple[Folder, str | None]:
    """Returns the folder that `path` names or is in, and the file's name if it names a file.

    Args:
        path: a local path, `gs://` or `s3://` path, or `hf:OWNER/NAME[@REVISION][/PATH]`.
        stack: closing it deletes the copies that `fetch` made of a bucket's files. One that was
            mapped before stays valid.

    Raises:
        CheckpointError: nothing is there, or the place cannot be reached.
    """
    text = os.fspath(path)
    if text.startswith("hf:"):
        return _open_hub(text)
    try:
        path = epath.Path(files.path(text))
    except ConfigError as error:
        page = _HUB_PAGE.match(text)
        inside = f"@{page[2]}/{page[3]}" if page and page[3] else ""
        remedy = "Download the file and pass its path." if text else "The path is empty."
        if page:
            remedy = f"Write hf:{page[1]}{inside}."
        elif text.startswith("file://"):
            remedy = f"Write {text.removeprefix('file://')}."
        raise CheckpointError(
            f"{text!r}: an address of an unknown kind",
            expected="a local path, gs://BUCKET/PATH or hf:OWNER/NAME",
            remedy=remedy,
        ) from error
    with _reaching(text):
        is_folder = path.is_dir()
        missing = not is_folder and not path.exists()
    if missing:
        hint = f" For the hub, write hf:{text}." if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
        if text.startswith("~"):
            hint = f" Only a shell knows ~: write {os.path.expanduser(text)}."
        if os.path.islink(path):
            hint = f" It is a link to {os.readlink(path)}, which is not there."
        raise CheckpointError(
            f"{text}: there is no such {'object' if files.is_remote(text) else 'file or folder'}",
            expected="a checkpoint file or its folder",
            remedy=f"Check the path.{hint}",
        )
    root, name = (path, None) if is_folder else _split(path)
    if not files.is_remote(text):
        return _plain_folder(root, str(root), lambda name: Path(root / name)), name
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="detailflow-")))

    def fetch(name: str) -> Path:
        target = scratch / name
        target.parent.mkdir(exist_ok=True)
        with (
            _reaching(_join(str(root), name)),
            (root / name).open("rb") as source,
            target.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 16 << 20)
        return target

    return _plain_folder(root, str(root), fetch), name


def _join(where: str, name: str) -> str:
    return f"{where.rstrip('/')}/{name}"


def _split(path: Any) -> tuple[Any, str]:
    """A file's folder and its name there; `checkpoints/` belongs to the folder above it."""
    if path.parent.name == "checkpoints":
        return path.parent.parent, f"checkpoints/{path.name}"
    return path.parent, path.name


@contextlib.contextmanager
def _reaching(where: str) -> Iterator[None]:
    try:
        with files.reaching(where):
            yield
    except BucketError:
        raise
    except Exception as error:  # Every driver of a bucket has its own, without a common base.
        raise CheckpointError(
            f"{where}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}",
            expected="a path that this machine may read",
            remedy="Check the path and the credentials, or copy the files here.",
        ) from error


def _plain_folder(root: epath.Path, where: str, fetch: Callable[[str], Path]) -> Folder:
    """A folder of this machine or of a bucket."""
    with _reaching(str(root)):
        inside = [*root.iterdir()]
        if any(path.name == "checkpoints" for path in inside):
            inside += (root / "checkpoints").iterdir()
        # In a bucket this would take a request per file; only files have suffixes there.
        if not files.is_remote(str(root)):
            # A link that leads nowhere is here, for the error to name it where it is read.
            inside = [path for path in inside if path.is_file() or not path.exists()]
    return Folder(where, sorted(path.relative_to(root).as_posix() for path in inside), fetch)


def _open_hub(text: str) -> tuple[Folder, str | None]:
    import huggingface_hub as hub
    from huggingface_hub import errors

    parts = _HUB.fullmatch(text)
    if not parts:
        raise CheckpointError(
            f"{text}: not a name on the hub", expected="hf:OWNER/NAME[@REVISION][/FILE]"
        )
    repo, revision = parts["repo"], parts["revision"]
    path = PurePosixPath(parts["file"] or ".")
    repository = f"hf:{repo}" + (f"@{revision}" if revision else "")

    def place(is_folder: bool) -> tuple[PurePosixPath, str | None, str]:
        root, name = (path, None) if is_folder else _split(path)
        return root, name, repository if root == PurePosixPath() else _join(repository, str(root))

    try:
        there = [*map(PurePosixPath, hub.HfApi().list_repo_files(repo, revision=revision))]
        root, name, where = place(any(path in file.parents for file in there))

        def fetch(name: str) -> Path:
            try:
                return Path(hub.hf_hub_download(repo, (root / name).as_posix(), revision=revision))
            except (OSError, errors.HTTPError) as error:
                raise _hub_error(_join(where, name), repo, error) from error

        inside = [f for f in there if f.parent in (root, root / "checkpoints")]
        return Folder(where, sorted(f.relative_to(root).as_posix() for f in inside), fetch), name
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _hub_error(repository, repo, error) from error
    # Offline or out of reach: what an earlier download left in the cache is used as a folder.
    except (OSError, errors.HTTPError) as error:
        try:
            cached = hub.snapshot_download(repo, revision=revision, local_files_only=True)
        except errors.LocalEntryNotFoundError as nothing:
            # Newer libraries refuse a snapshot that lacks any file of the repository; the few that
            # are wanted here may well be in it.
            cached = getattr(nothing, "snapshot_path", None)
        if not cached:
            raise _hub_error(repository, repo, error) from error
        root, name, where = place((Path(cached) / path).is_dir())
        snapshot = epath.Path(cached) / root
        return _plain_folder(snapshot, where, lambda name: Path(snapshot / name)), name


def _hub_error(where: str, repo: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"{where}: the hub did not give it, and it is not in the cache ({reason})",
        expected=f"the repository on the hub, or a copy of it in {cache}",
        remedy=f"Where there is network, run `hf download {repo}` and put its folder there, or "
        "pass the path of the downloaded folder; set HF_TOKEN for a private repository.",
    )
