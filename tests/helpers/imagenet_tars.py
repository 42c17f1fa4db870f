"""Tars of the form that ImageNet has, of scikit-learn's two photographs, cut and scaled."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from pixels import photographs

PHOTOS = [Image.fromarray(photo) for photo in photographs()]
SIZES = [(500, 375), (333, 500), (120, 90), (640, 426), (64, 200)]


def photo(seed):
    """A cut of a photograph, of another size each time."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 200), rng.integers(0, 100)
    cut = PHOTOS[seed % 2].crop((x, y, x + 400, y + 300))
    return cut.resize(SIZES[seed % len(SIZES)], Image.Resampling.LANCZOS)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tar_of(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_tars(data_dir, training, validation):
    manual = pathlib.Path(data_dir, "downloads", "manual")
    manual.mkdir(parents=True, exist_ok=True)
    inner = {f"{synset}.tar": tar_of(files) for synset, files in training.items()}
    (manual / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (manual / "ILSVRC2012_img_val.tar").write_bytes(tar_of(validation))
    return manual
