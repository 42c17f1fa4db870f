"""Prepares an image-classification dataset of TFDS once, for random access.

    detailflow prepare --dataset imagenet2012 --data_dir /data/tfds

ImageNet is written from its two tars (`imagenet`); an interrupted run continues where it stopped.
TFDS itself builds every other dataset and downloads what it needs; an interrupted run uses finished
downloads again. A dataset gets its final name only when it is complete. A finished one is left as
it is, so the same command can be run again at any time.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import tarfile
from collections.abc import Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from detailflow_jax.data import imagenet
from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.data.pipeline import iterate_crops
from detailflow_jax.data.sources import image_and_label, make_source, unknown_dataset
from detailflow_jax.runtime import extras, files
from detailflow_jax.runtime.command import make_parser
from detailflow_jax.runtime.errors import ConfigError, FileError, UserError, reported
from detailflow_jax.runtime.workdir import hold_workdir

IMAGENET = "imagenet2012"
_SPACE = 1.05  # Free bytes needed for each byte of the tars.


class PrepareError(UserError, ValueError):
    """A dataset that cannot be prepared; the text says why and what to do."""


def prepare(
    name: str,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    *,
    partial: bool = False,
    md5: bool = False,
) -> Any:
    """Prepares a dataset unless that is done, and returns its TFDS builder.

    Args:
        name: of TFDS, with a config or version where wanted: "cifar10", "imagenet_v2/topimages".
        data_dir: where TFDS keeps its data: local or mounted; gs:// except for ImageNet. None:
            $TFDS_DATA_DIR, else the default of TFDS.
        manual_dir: where files are that have to be fetched by hand; None: where TFDS looks,
            DATA_DIR/downloads/manual.
        partial, md5: see `imagenet.index_tars`.

    Raises:
        PrepareError, TarError, ConfigError: nothing was prepared; the text says what to do.
    """
    for place in filter(None, (data_dir, manual_dir)):
        files.path(place)
    builder = _open_builder(name, data_dir)
    image_and_label(builder)  # Raises before anything is fetched.
    if _is_done(builder):
        return builder
    manual_dir = epath.Path(manual_dir or epath.Path(builder.data_dir_root, "downloads", "manual"))
    with _foreseen(builder), _alone(builder):
        if builder.data_path.exists():  # Another process was faster, or somebody put it there.
            builder = _open_builder(name, data_dir)
            if _is_done(builder):
                return builder
            raise PrepareError(f"{builder.data_path} is not a whole dataset: remove it")
        if builder.name == IMAGENET:
            _write_imagenet(builder, manual_dir, partial=partial, md5=md5)
        else:
            _build(builder, manual_dir)
    return _open_builder(name, data_dir)


def _open_builder(name: str, data_dir: str | None) -> Any:
    tf, tfds = extras.require("tensorflow"), extras.require("tensorflow_datasets")
    for kind in ("GPU", "TPU"):  # TensorFlow would take their memory.
        with contextlib.suppress(RuntimeError, ValueError):
            tf.config.set_visible_devices([], kind)
    try:
        return tfds.builder(name, data_dir=data_dir or os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_dataset(name, data_dir or str(tfds.core.constants.DATA_DIR)) from error


def _is_done(builder: Any) -> bool:
    if not builder.is_prepared():
        return False
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise PrepareError(
            f"{builder.data_path} is stored as {' '.join(formats)}, which has no random access. "
            "Remove it, choose another --data_dir, or convert it with: python -m "
            "tensorflow_datasets.scripts.convert_format --to_file_format=array_record "
            f"--dataset_dir={shlex.quote(os.fspath(builder.data_path))}"
        )
    return True


def _in_bucket(builder: Any) -> bool:
    return os.fspath(builder.data_path).startswith("gs://")


@contextlib.contextmanager
def _alone(builder: Any):
    """Within it no other process prepares this dataset, as far as the file system has locks."""
    folder = builder.data_path.parent
    with contextlib.ExitStack() as stack:
        try:
            if not _in_bucket(builder):
                stack.enter_context(hold_workdir(folder))
        except ConfigError as error:
            raise PrepareError(
                f"{folder}: another process prepares it, or it cannot be written"
            ) from error
        yield


@contextlib.contextmanager
def _foreseen(builder: Any):
    """Turns files that are missing, unreachable or unknown, or a full disk, into PrepareError."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    download = tfds.core.download
    foreseen = (
        AssertionError,
        OSError,
        tarfile.TarError,
        tf.errors.OpError,
        download.util.DownloadError,
        download.download_manager.NonMatchingChecksumError,
    )
    try:
        yield
    except foreseen as error:
        if isinstance(error, UserError) and not isinstance(error, FileError):
            raise
        raise PrepareError(
            f"{builder.name} cannot be prepared: {error}\n"
            "When that is mended, run the same command again"
        ) from error


def _write_imagenet(builder: Any, manual_dir: epath.Path, *, partial: bool, md5: bool) -> None:
    root = builder.data_dir_root
    if _in_bucket(builder):
        raise PrepareError(
            f"{root}: ImageNet is prepared on a local or mounted disk; choose another --data_dir "
            "and copy the finished folder to the bucket"
        )
    synsets = builder.info.features["label"].names
    splits = imagenet.index_tars(manual_dir, synsets, partial=partial, md5=md5)
    written = imagenet.progress_folder(builder).glob("*")
    needed = _SPACE * sum(split.path.stat().length for split in splits)
    needed -= sum(file.stat().st_size for file in written)
    if (free := shutil.disk_usage(root).free) < needed:
        raise PrepareError(
            f"{root} has {free / 1e9:,.0f} GB free, preparing needs about {needed / 1e9:,.0f} GB "
            "for the dataset: make room or choose another --data_dir; the tars may be elsewhere, "
            "see --manual_dir"
        )
    imagenet.write(builder, splits)


def _build(builder: Any, manual_dir: epath.Path) -> None:
    """Lets TFDS build the dataset."""
    import tensorflow_datasets as tfds

    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not manual_dir.exists():
        raise PrepareError(
            f"the files of {builder.name} have to be fetched by hand, into {manual_dir}:\n"
            f"{builder.MANUAL_DOWNLOAD_INSTRUCTIONS.strip()}"
        )
    # TFDS leaves the half-written folders of runs that were killed.
    for left in builder.data_path.parent.glob(f"incomplete.*_{builder.data_path.name}"):
        left.rmtree()
    # Not the copy that TFDS offers of small datasets: it is stored without random access.
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format="array_record")


def verify(builder: Any) -> dict[str, list[UnreadableImage]]:
    """Decodes every image of every split, and returns the unreadable ones by split."""
    root = os.fspath(builder.data_dir_root)
    name, _, version = builder.info.full_name.rpartition("/")
    unreadable = {}
    for split in builder.info.splits:
        source = make_source(f"tfds:{name}:{version}:{split}", data_dir=root)
        crops = iterate_crops(source, range(len(source)), 8, "none")
        shown = tqdm(crops, total=len(source), desc=f"verify {split}", unit="image")
        unreadable[split] = [x for _, x in shown if isinstance(x, UnreadableImage)]
    return unreadable


def report(builder: Any) -> str:
    """What was prepared, and how to train on it."""
    lines = [f"{builder.info.full_name} is prepared in {builder.data_path}"]
    lines += [
        f"  {split}: {info.num_examples:,} images, {tqdm.format_sizeof(info.num_bytes, 'B')} in "
        f"{info.num_shards} file(s)"
        for split, info in builder.info.splits.items()
    ]
    config = builder.builder_config
    name = f"{builder.name}/{config.name}" if config else builder.name
    use = f"--config.data.source=tfds:{name} --config.data.data_dir={builder.data_dir_root}"
    return "\n".join([*lines, f"train on it with: {use}"])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        "prepare",
        description="Prepare an image-classification dataset of TFDS as ArrayRecord files, once, "
        "for training with --config.data.source=tfds:NAME. Run the same command again after an "
        "interruption; a finished dataset is left as it is.",
        epilog=f"""\
ImageNet: register at image-net.org, put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
DATA_DIR/downloads/manual and run with --dataset {IMAGENET}. Other datasets are downloaded:
--dataset cifar10, oxford_flowers102, food101, imagenette/320px-v2, ...

exit codes: 0 prepared; 2 it cannot be, the text says what to do.""",
    )
    add, switch = parser.add_argument, {"action": "store_true"}
    add("--dataset", default=IMAGENET, metavar="NAME", help="name in TFDS (default: %(default)s)")
    where = "where TFDS keeps its data: local, mounted or gs://BUCKET/..."
    where += " (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    add("--data_dir", metavar="DIR", help=where)
    where = "where the files are that have to be fetched by hand"
    where += " (default: DATA_DIR/downloads/manual)"
    add("--manual_dir", metavar="DIR", help=where)
    partial = "accept ImageNet tars that hold less than the official ones, or no training tar"
    add("--partial", **switch, help=partial)
    md5 = "compare the checksums of the ImageNet tars first (reads all 155 GB)"
    add("--md5", **switch, help=md5)
    decode = "afterwards decode every image and list those that training will skip"
    add("--verify", **switch, help=decode)
    return parser.parse_args(argv)


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 130 for Ctrl-C, or an error's exit code."""
    args = parse_arguments(argv)
    try:
        builder = prepare(
            args.dataset, args.data_dir, args.manual_dir, partial=args.partial, md5=args.md5
        )
        print(report(builder))
        if args.verify:
            for split, images in verify(builder).items():
                print(f"{split}: {len(images)} unreadable images, which training skips and counts")
                print("".join(f"  {image}\n" for image in images), end="")
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
