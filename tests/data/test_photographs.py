"""Photographs and scans as people have them: malformed EXIF, large profiles and texts, size."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from detailflow_jax.data import UnreadableImage, images, make_source
from detailflow_jax.data.images import decode_image, decode_picture
from detailflow_jax.data.transforms import center_crop


def picture(height=24, width=40):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 9, 255 - x * 5], -1).astype(np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_block(*entries):
    """A big-endian EXIF block from raw IFD entries (tag, type, count, 4 bytes of value)."""
    table = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    head = b"Exif\0\0MM\0*\0\0\0\x08"
    return head + struct.pack(">H", len(entries)) + table + b"\0\0\0\0"


def orientation(value):
    return (0x0112, 3, 1, struct.pack(">HH", value, 0))


MALFORMED = {
    "ResolutionUnit of the wrong type": (0x0128, 2, 4, b"inch"),
    "ResolutionUnit of no type": (0x0128, 99, 1, b"\0\x02\0\0"),
    "Make as numbers": (0x010F, 3, 2, b"\0\x01\0\x02"),
    "ExposureBias in the first table": (0x9204, 10, 1, b"\xff\xff\xff\xf0"),
    "offset beyond the end": (0x010F, 2, 4000, b"\0\0\xff\0"),
    "XResolution without a value": (0x011A, 5, 0, b"\0\0\0\0"),
    "thumbnail table that is none": (0x8769, 4, 1, b"\0\0\xff\xf0"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken EXIF.
@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("broken", MALFORMED.values(), ids=MALFORMED)
def test_one_malformed_tag_costs_no_photograph(broken, value):
    exif = exif_block(*sorted([orientation(value), broken]))
    sane = Image.Exif()
    sane[ExifTags.Base.Orientation] = value
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(picture(), kind, exif=exif, **options)
        same = Image.open(io.BytesIO(encoded(picture(), kind, exif=sane, **options)))
        expected = np.asarray(ImageOps.exif_transpose(same).convert("RGB"))
        np.testing.assert_array_equal(decode_image(data, "x"), expected)
        stored = decode_picture(data, "x", upright=False).pixels
        assert stored.size == (40, 24)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_out_of_range_turns_nothing(value):
    data = encoded(picture(), "PNG", exif=exif_block(orientation(value)))
    np.testing.assert_array_equal(decode_image(data, "x"), np.asarray(picture()))


@pytest.mark.parametrize("count", [0, 2, 100])
def test_an_orientation_that_is_not_one_number_turns_nothing(count):
    exif = exif_block((0x0112, 3, count, struct.pack(">HH", 6, 0)))
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(), kind, exif=exif)
        np.testing.assert_array_equal(decode_image(data, "x"), plainly(data))


def test_pillow_says_nothing_of_malformed_exif(fresh_formats):
    data = encoded(picture(), "JPEG", exif=exif_block((0x010F, 2, 4000, b"\0\0\xff\0")))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        decode_image(data, "x")
    assert said == []
    with pytest.warns(UserWarning):  # in words that differ by its version
        plainly(data)


def test_turned_tiffs_are_turned_once():
    for compression in (None, "tiff_lzw"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        data = encoded(picture(), "TIFF", exif=exif, compression=compression)
        turned = np.rot90(np.asarray(picture()), -1)
        np.testing.assert_array_equal(decode_image(data, "x"), turned)
        assert decode_picture(data, "x").size == (24, 40)


def chunk(kind, content):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


LARGE = b"a" * 2**21
TEXTS = {
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(LARGE)),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE)),
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"b" * 2**17),  # Many of them, to Pillow.
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("before_pixels", [True, False])
def test_large_texts_and_profiles_cost_no_png(text, before_pixels, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**16)
    data = encoded(picture(), "PNG", exif=exif_block(orientation(3)))
    place = 33 if before_pixels else data.rindex(b"IEND") - 4
    data = data[:place] + text + data[place:]
    np.testing.assert_array_equal(decode_image(data, "x"), np.rot90(np.asarray(picture()), 2))
    with pytest.raises(UnreadableImage):
        decode_image(data[: data.index(b"IDAT") + 20], "x")


CLEAR = {  # Colour type and bits of a PNG, its one transparent value, what three pixels become.
    "grey": (0, 8, [100], [[0, 255, 200]]),
    "grey of 16 bits": (0, 16, [100 * 257], [[0, 255, 200]]),
    "colours": (2, 8, [100, 100, 100], [[0, 255, 200]]),
    # Pillow takes the transparent value for one of 8 bits.
    "colours of 16 bits": (2, 16, [100, 100, 100], [[0, 100, 200]]),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_one_transparent_value_of_a_png_is_laid_over_white(kind):
    colour, bits, clear, expected = CLEAR[kind]
    pixels = np.array([0, 100, 200]) * (257 if bits == 16 else 1)
    row = b"\0" + np.repeat(pixels, len(clear)).astype(f">u{bits // 8}").tobytes()
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, content)
        for name, content in (
            (b"IHDR", struct.pack(">IIBBBBB", 3, 1, bits, colour, 0, 0, 0)),
            (b"tRNS", struct.pack(f">{len(clear)}H", *clear)),
            (b"IDAT", zlib.compress(row)),
            (b"IEND", b""),
        )
    )
    np.testing.assert_array_equal(decode_image(data, "x")[..., 0], expected)


BESIDE_PNG = {
    "pHYs": b"abc", "gAMA": b"a", "cHRM": b"abcd", "sRGB": b"", "iCCP": b"", "zTXt": b"a\0\x09b",
    "acTL": b"a",
}  # fmt: skip
BESIDE_JPEG = {
    "Photoshop": b"\xed\0\x16Photoshop 3.0\x008BIM\x03\xed",
    "Adobe": b"\xee\0\x07Adobe",
}


@pytest.mark.parametrize(("kind", "content"), BESIDE_PNG.items(), ids=BESIDE_PNG)
def test_what_is_malformed_beside_the_pixels_costs_no_png(kind, content):
    data = encoded(picture(), "PNG", exif=exif_block(orientation(6)))
    data = data[:33] + chunk(kind.encode(), content) + data[33:]
    expected, plain = np.rot90(np.asarray(picture()), -1), plainly(data)
    # Pillow before version 13 reads past a broken cHRM by itself.
    assert plain is None or (kind == "cHRM" and np.array_equal(plain, expected))
    np.testing.assert_array_equal(decode_image(data, "x"), expected)
    with pytest.raises(UnreadableImage):
        decode_image(data[: data.index(b"IDAT") + 20], "x")
    pixels = bytearray(data)
    pixels[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(UnreadableImage):
        decode_image(bytes(pixels), "x")


@pytest.mark.parametrize("segment", BESIDE_JPEG.values(), ids=BESIDE_JPEG)
def test_what_is_malformed_beside_the_pixels_costs_no_jpeg(segment):
    for image in (picture(), picture().convert("CMYK")):
        data = encoded(image, "JPEG", exif=exif_block(orientation(6)))
        broken = data[:2] + b"\xff" + segment + data[2:]
        assert plainly(broken) is None
        np.testing.assert_array_equal(decode_image(broken, "x"), plainly(data))
        with pytest.raises(UnreadableImage):
            decode_image(broken[:-200], "x")


def test_a_scan_too_large_for_memory_is_read_as_a_draft_if_it_is_a_jpeg(monkeypatch):
    large = picture(480, 640)
    monkeypatch.setenv(images.MAX_PIXELS, "10000")
    reduced = decode_picture(encoded(large, "JPEG", quality=95), "x")
    assert (reduced.reduction, reduced.size) == (8, (640, 480))
    assert reduced.pixels.size == (80, 60)
    whole = center_crop(np.asarray(large), 32).astype(int)
    assert np.abs(center_crop(reduced, 32) - whole).mean() < 12
    exif = exif_block(orientation(6))
    turned = decode_picture(encoded(large, "JPEG", quality=95, exif=exif), "x")
    assert turned.size == turned.pixels.size == (60, 80)
    for kind in ("PNG", "BMP", "TIFF", "WEBP"):
        with pytest.raises(UnreadableImage, match=rf"640x480 .*{images.MAX_PIXELS}=307200"):
            decode_image(encoded(large, kind), "x")
    monkeypatch.setenv(images.MAX_PIXELS, "307200")
    assert decode_image(encoded(large, "PNG"), "x").shape == (480, 640, 3)
    monkeypatch.setenv(images.MAX_PIXELS, "1000")
    with pytest.raises(UnreadableImage, match="640x480"):  # Too large even at an eighth.
        decode_image(encoded(large, "JPEG"), "x")
    monkeypatch.setenv(images.MAX_PIXELS, "many")
    with pytest.raises(ValueError, match="expected a number of pixels"):
        decode_image(encoded(large, "JPEG"), "x")


def test_the_size_that_a_file_claims_is_no_reason_to_fill_the_memory():
    data = bytearray(encoded(picture(), "PNG"))
    data[16:24] = struct.pack(">II", 2**17, 2**17)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UnreadableImage, match="17180 megapixels"):
        decode_image(bytes(data), "x")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.fixture
def fresh_formats():
    images._formats.cache_clear()
    yield
    images._formats.cache_clear()


def test_heic_names_the_package_that_reads_it(monkeypatch, fresh_formats):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # As if it were not installed.
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(UnreadableImage, match="pip install pillow-heif"):
        decode_image(HEIC, "x.heic")


@pytest.mark.parametrize("value", [None, *range(1, 9)])
def test_heic_photographs_are_read_upright(tmp_path, value):
    """With the plugin that people install, in every orientation, grey and with transparency."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    if value:
        exif[ExifTags.Base.Orientation] = value
    file = tmp_path / "trip" / "IMG_1.HEIC"
    file.parent.mkdir()
    # Telephones write the orientation twice; of bytes, the plugin does as well.
    options = {"exif": exif.tobytes()} if value else {}
    whole = encoded(picture(), "HEIF", quality=-1, **options)
    file.write_bytes(whole)
    found = make_source(f"folder:{tmp_path}")[0]["image"]
    np.testing.assert_array_equal(found, plainly(whole))
    upright = np.asarray(ImageOps.exif_transpose(with_exif(picture(), exif)))
    assert np.abs(found.astype(int) - upright).max() < 16  # The colours are rounded.
    grey = picture().convert("LA")
    grey.putalpha(0)
    assert (decode_image(encoded(grey.convert("RGBA"), "HEIF", quality=-1), "x") > 250).all()
    for cut in (whole[: len(whole) // 2], whole[:64]):
        with pytest.raises(UnreadableImage):
            decode_image(cut, "x")


def with_exif(image, exif):
    """The image as a file with this EXIF is opened."""
    return Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))


def test_avif_is_read():
    data = encoded(picture(), "AVIF", quality=100)
    assert np.abs(decode_image(data, "x").astype(int) - np.asarray(picture())).max() < 40
    np.testing.assert_array_equal(decode_image(data, "x"), plainly(data))


def plainly(data):
    """What Pillow itself reads, upright; None where it cannot."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        return None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_files_are_read_as_pillow_reads_them_or_not_at_all(kind):
    rng = np.random.default_rng(0)
    data = encoded(picture(), kind)
    outcomes = set()
    for _ in range(80):
        broken = bytearray(data)
        for place in rng.integers(len(data) // 4, len(data), 2):
            broken[place] = rng.integers(256)
        expected = plainly(bytes(broken))
        try:
            found = decode_image(bytes(broken), "x")
        except UnreadableImage:
            found = None
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_array_equal(found, expected)
        outcomes.add(found is None)
    assert False in outcomes
