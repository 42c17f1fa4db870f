"""How fast one core reads and crops ImageNet's images: this pipeline, a bare loop, tf.data.

    python benchmarks/input.py --cores 1
    python benchmarks/input.py --source tfds:imagenet2012 --data_dir /data/tfds --images 2000

Without --source it makes JPEG files of ImageNet's usual sizes from two photographs, packs them
into a tar of ImageNet's form and prepares them with `detailflow_jax.data.prepare`. What is timed,
all on the same images and held to --cores cores:

    pipeline       make_iterator: TFDS ArrayRecord, shuffled, random crop and flip, batches
    scaled         the same with scaled_decode, which decodes large JPEGs at half their size
    bare           a loop over the files: open, decode, crop with the functions of the pipeline
    plain          a loop over the files with Pillow alone, as the recipe is usually written:
                   decode, convert, resize the whole image, cut the crop out
    tf.data        the same crop in TensorFlow, window only, batched and prefetched

Each figure is the best of --repeats passes, which alternate. CPU ms is the processor time of this
process an image, which other work on the machine disturbs less than the rate. The pipeline has to
reach 85% of the bare loop, by processor time, or by the rate where it has worker processes. Then
--total images are read and the memory of the process is watched. Prints a table, and the same as
one line of JSON.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from detailflow_jax.data import make_iterator, make_source, training_crop
from detailflow_jax.data.images import decode_picture

SYNSETS = [f"n0{number}" for number in (1440764, 1443537, 1484850, 1491361)]
# (width, height) and how many of twenty images have it: close to ImageNet's own mixture, whose
# median is 500 x 375 and whose mean file has about 110 kB.
MIXTURE = [((500, 375), 9), ((375, 500), 3), ((500, 333), 3), ((320, 240), 3), ((1280, 960), 2)]
MIN_SCALE = 0.8
TARGET = 0.85

# ----------------------------------------------------------------------------------- the images


def make_files(folder: pathlib.Path, count: int) -> None:
    """Writes `count` JPEG files, cuts of scikit-learn's photographs, to folder/SYNSET/."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    sizes = [size for size, often in MIXTURE for _ in range(often)]
    rng = np.random.default_rng(0)
    for number in range(count):
        size = sizes[number % len(sizes)]
        width = int(rng.integers(300, 600))
        x, y = rng.integers(0, 641 - width), rng.integers(0, 128)
        cut = photos[number % 2].crop((x, y, x + width, y + 300))
        pixels = np.asarray(cut.resize(size, Image.Resampling.LANCZOS), np.int16)
        grain = rng.integers(-8, 9, pixels.shape, np.int16)  # A camera's, for the file size.
        synset = SYNSETS[number % len(SYNSETS)]
        path = folder / synset / f"{synset}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def prepare_tfds(files: pathlib.Path, data_dir: pathlib.Path) -> None:
    """Packs the files into ImageNet's two tars and runs the prepare command on them."""
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted(files.iterdir()):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as inner:
                for file in sorted(folder.iterdir()):
                    inner.add(file, file.name)
            member = tarfile.TarInfo(f"{folder.name}.tar")
            member.size = packed.tell()
            packed.seek(0)
            outer.addfile(member, packed)
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as outer:
        outer.add(next(files.glob("*/*")), "ILSVRC2012_val_00000001.JPEG")
    command = [sys.executable, "-m", "detailflow_jax.data.prepare", "--partial"]
    subprocess.run([*command, "--data_dir", str(data_dir)], check=True, stdout=sys.stderr)


def export_files(args: argparse.Namespace, files: pathlib.Path) -> None:
    """Writes the first `args.images` records of an existing source as files, for the loops."""
    source = make_source(args.source, data_dir=args.data_dir)
    (files / "all").mkdir(parents=True)
    for number in range(args.images):
        (files / "all" / f"{number}.JPEG").write_bytes(source._records[number][source._image])


# --------------------------------------------------------------------------- what is timed


def pipeline(args: argparse.Namespace, **change) -> Iterator[int]:
    """The number of images of each batch, without end."""
    data = {
        "source": args.source,
        "split": f"train[:{args.images}]",
        "data_dir": args.data_dir,
        "image_size": args.size,
        "crop": "random",
        "min_scale": MIN_SCALE,
        "flip": True,
        "num_workers": args.workers,
        "prefetch": args.prefetch,
        "num_threads": args.threads or args.cores,
    }
    iterator = make_iterator(data | change, batch_size=args.batch, seed=0)
    with contextlib.closing(iterator):
        for batch in iterator:
            yield len(batch["image"])


def bare(args: argparse.Namespace, paths: list[str]) -> Iterator[int]:
    rng = np.random.default_rng(0)
    for path in itertools.cycle(paths):
        with open(path, "rb") as file:
            picture = decode_picture(file.read(), path)
        training_crop(picture, args.size, "random", rng, min_scale=MIN_SCALE, flip=True)
        yield 1


def plain(args: argparse.Namespace, paths: list[str]) -> Iterator[int]:
    rng = np.random.default_rng(0)
    size = args.size
    for path in itertools.cycle(paths):
        image = Image.open(path).convert("RGB")
        short = int(rng.integers(size, math.ceil(size / MIN_SCALE) + 1))
        while min(image.size) >= 2 * short:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = short / min(image.size)
        whole = (round(image.width * scale), round(image.height * scale))
        pixels = np.asarray(image.resize(whole, Image.Resampling.BICUBIC))
        x, y = rng.integers(whole[0] - size + 1), rng.integers(whole[1] - size + 1)
        view = pixels[y : y + size, x : x + size]
        np.ascontiguousarray(view[:, ::-1] if rng.random() < 0.5 else view)
        yield 1


def tf_data(args: argparse.Namespace, paths: list[str]) -> Iterator[int]:
    import tensorflow as tf

    size = args.size

    def halve(image):
        half = tf.shape(image)[:2] // 2
        return tf.image.resize(image, half, tf.image.ResizeMethod.AREA)

    def view(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.cast(image, tf.float32)
        short = tf.random.uniform([], size, math.ceil(size / MIN_SCALE) + 1, tf.int32)
        wide = lambda image: tf.reduce_min(tf.shape(image)[:2]) >= 2 * short  # noqa: E731
        shape = tf.TensorShape([None, None, 3])
        (image,) = tf.while_loop(wide, lambda x: (halve(x),), (image,), (shape,))
        sides = tf.cast(tf.shape(image)[:2], tf.float32)
        whole = tf.round(sides * tf.cast(short, tf.float32) / tf.reduce_min(sides))
        corner = tf.floor(tf.random.uniform([2]) * (whole - size + 1))
        image = tf.raw_ops.ScaleAndTranslate(  # What tf.image.resize calls, window only.
            images=image[None],
            size=[size, size],
            scale=whole / sides,
            translation=-corner,
            kernel_type="keyscubic",
            antialias=True,
        )[0]
        image = tf.image.random_flip_left_right(image)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    dataset = dataset.map(view, num_parallel_calls=args.cores).batch(args.batch).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = args.cores
    for batch in dataset.with_options(options).as_numpy_iterator():
        yield len(batch)


# ----------------------------------------------------------------------------------- measuring


def read(stream: Iterator[int], images: int) -> tuple[float, float]:
    """(wall-clock, processor) milliseconds per image, over at least this many images."""
    done, wall, cpu = 0, time.perf_counter(), time.process_time()
    while done < images:
        done += next(stream)
    return (time.perf_counter() - wall) * 1e3 / done, (time.process_time() - cpu) * 1e3 / done


def measure_times(streams: dict[str, Callable], args: argparse.Namespace) -> dict[str, tuple]:
    """The least times of each stream; they take turns, so that a busy moment hits all alike.

    Each turn starts a stream, lets it fill its buffers, and ends it: none works ahead during the
    turn of another. The first epoch is for that, and the second is timed, so that each stream is
    timed on the same images: the few large ones weigh much.
    """
    best = dict.fromkeys(streams, (math.inf, math.inf))
    for _ in range(args.repeats):
        for name, make_stream in streams.items():
            with contextlib.closing(make_stream()) as stream:
                read(stream, args.images)
                taken = read(stream, args.images)
            best[name] = tuple(map(min, best[name], taken))
    return best


def resident_mb() -> float:
    """Resident memory of this process and its workers."""
    pids = [os.getpid()]
    for task in pathlib.Path("/proc/self/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    pages = 0
    for pid in pids:
        pages += int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(make_stream: Callable[[], Iterator[int]], total: int) -> list[float]:
    """Resident megabytes at ten points of a run of `total` images."""
    stream, done, marks = make_stream(), 0, []
    while done < total:
        done += next(stream)
        while len(marks) < 10 and done >= total * (len(marks) + 1) / 10:
            marks.append(round(resident_mb(), 1))
    return marks


def measure(args: argparse.Namespace, files: pathlib.Path) -> dict:
    """Everything the table shows, by name."""
    paths = sorted(str(path) for path in files.glob("*/*.JPEG"))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    memory = measure_memory(lambda: pipeline(args), args.total)
    streams = {
        "bare": lambda: bare(args, paths),
        "pipeline": lambda: pipeline(args),
        "scaled": lambda: pipeline(args, scaled_decode=True),
        "plain": lambda: plain(args, paths),
    }
    if not args.no_tf:
        streams["tf.data"] = lambda: tf_data(args, paths)
    times = measure_times(streams, args)
    sizes = [os.path.getsize(path) for path in paths]
    by = 0 if args.workers else 1  # The processor time of workers is not counted here.
    bare_loop = times["bare"][by] / (args.cores if args.workers else 1)
    return {
        "images a second": {name: round(1e3 / wall, 1) for name, (wall, _) in times.items()},
        "cpu ms an image": {name: round(cpu, 3) for name, (_, cpu) in times.items()},
        "cores": args.cores,
        "share of bare": {name: round(bare_loop / t[by], 3) for name, t in times.items()},
        "mean file kB": round(float(np.mean(sizes)) / 1e3, 1),
        "memory MB": memory,
        "memory growth MB": round(max(memory[2:]) - memory[1], 1),
    }


def table(args: argparse.Namespace, found: dict) -> str:
    rates = found["images a second"]
    title = (
        f"{args.images} images of {found['mean file kB']} kB on average, random {args.size} px "
        f"crops, batch {args.batch}, {args.cores} core(s), {args.workers} workers"
    )
    lines = [title, f"{'':10} {'images/s':>9} {'a core':>8} {'of bare':>8} {'CPU ms':>8}"]
    for name, value in rates.items():
        share, cpu = found["share of bare"][name], found["cpu ms an image"][name]
        lines.append(f"{name:10} {value:9.0f} {value / args.cores:8.0f} {share:8.0%} {cpu:8.2f}")
    verdict = "reached" if found["share of bare"]["pipeline"] >= TARGET else "MISSED"
    lines.append(f"pipeline at least {TARGET:.0%} of the bare loop a core: {verdict}")
    marks = " ".join(f"{mark:.0f}" for mark in found["memory MB"])
    lines.append(f"resident MB over {args.total} images, at every tenth: {marks}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", help="an existing one, such as tfds:imagenet2012; default: made here")
    add("--data_dir", help="where TFDS keeps that")
    add("--images", type=int, default=512, help="images, whole batches (default %(default)s)")
    add("--total", type=int, default=10_000, help="images to watch the memory over")
    add("--size", type=int, default=256, help="side of the crop (default %(default)s)")
    add("--batch", type=int, default=64, help="images a batch (default %(default)s)")
    add("--cores", type=int, default=1, help="cores to keep to (default %(default)s)")
    add("--workers", type=int, default=0, help="worker processes of the pipeline")
    add("--prefetch", type=int, default=2, help="batches ahead (default %(default)s)")
    add("--threads", type=int, default=0, help="threads of the pipeline (default: one a core)")
    add("--repeats", type=int, default=3, help="passes; the best counts (default %(default)s)")
    add("--no_tf", action="store_true", help="leave out tf.data")
    args = parser.parse_args()
    if args.images % args.batch:
        parser.error(f"--images {args.images} is not a multiple of --batch {args.batch}")
    with tempfile.TemporaryDirectory() as scratch:
        files = pathlib.Path(scratch) / "files"
        if args.source:
            export_files(args, files)
        else:
            make_files(files, args.images)
            prepare_tfds(files, pathlib.Path(scratch) / "tfds")
            args.source, args.data_dir = "tfds:imagenet2012", str(pathlib.Path(scratch) / "tfds")
        found = measure(args, files)
    print(table(args, found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
