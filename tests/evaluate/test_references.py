"""Images and references as they are read, measured and refused."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from detailflow_jax.evaluate import (
    distances,
    generation,
    references,
)
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.samples import NpzImages, open_samples, write_samples
from scored_models import (
    SIZE,
    extractor,
    images,
    save_pictures,
)

# -------------------------------------------------------------------------------------- the .npz


def test_npz_has_the_published_layout_both_ways(tmp_path):
    data = images(5)
    write_samples(tmp_path / "ours.npz", data.shape, [data[:3], data[3:]])
    with np.load(tmp_path / "ours.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], data)
    np.savez(tmp_path / "theirs.npz", data)
    np.savez_compressed(tmp_path / "packed.npz", data, np.arange(5))
    np.savez(tmp_path / "columns.npz", np.asfortranarray(data))
    for name in ("ours", "theirs", "packed", "columns"):
        found = NpzImages(tmp_path / f"{name}.npz")
        assert len(found) == 5 and found.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(found.read(1, 4), data[1:4])
    with pytest.raises(EvaluationError, match="5 images were given, expected 6"):
        write_samples(tmp_path / "short.npz", (6, *data.shape[1:]), [data])
    assert not (tmp_path / "short.npz").exists()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(tmp_path, version):
    data = images(5)
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, data, version=version)
    np.testing.assert_array_equal(NpzImages(path).read(1, 4), data[1:4])


@pytest.mark.parametrize("order", ["C", "F"])
def test_images_that_lost_their_range_are_told(tmp_path, caplog, order):
    for scale in (255, 1):
        np.savez(tmp_path / "x.npz", (images(5) / 255 * scale).astype(np.uint8, order=order))
        NpzImages(tmp_path / "x.npz").read(0, 5)
        assert ("no pixel of the first 5 images is above 1" in caplog.text) == (scale == 1)


def test_pictures_are_read_in_order_and_cropped(tmp_path):
    data = images(3)
    save_pictures(tmp_path, data, "b/{}.png")
    save_pictures(tmp_path, images(1, seed=1), "a/x{}.PNG")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = open_samples(tmp_path)
    np.testing.assert_array_equal(found.read(0, 4), np.concatenate([images(1, seed=1), data]))
    save_pictures(tmp_path, images(1, size=20), "c/{}.png")
    with pytest.raises(EvaluationError, match=r"c/0.png is 20x20 px, the first one 16x16"):
        open_samples(tmp_path).read(0, 5)
    assert references.open_images(str(tmp_path), 8).read(0, 5).shape == (5, 8, 8, 3)


# ----------------------------------------------------------------------------------- references


def test_the_same_reference_from_images_statistics_and_pictures(tmp_path, reference, small_chunks):
    """An `.npz` of images, of statistics, of both; a folder: one set, one reference."""
    statistics = {
        "mu": reference.pool.mean,
        "sigma": reference.pool.covariance,
        "mu_s": reference.spatial.mean,
        "sigma_s": reference.spatial.covariance,
    }
    features = extractor()(images())
    np.testing.assert_allclose(statistics["mu"], features["pool"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        statistics["sigma_s"], np.cov(features["spatial"], rowvar=False), atol=1e-10
    )
    save_pictures(tmp_path / "all", images())
    np.savez(tmp_path / "statistics.npz", **statistics)
    np.savez(tmp_path / "both.npz", images(30), **statistics)
    for spec in ("all", "statistics.npz", "both.npz"):
        found = references.load_reference(
            tmp_path / spec, extractor(7), image_size=SIZE, cache=tmp_path / "cache"
        )
        np.testing.assert_allclose(found.pool.mean, reference.pool.mean, rtol=1e-6)
        np.testing.assert_allclose(
            found.spatial.covariance, reference.spatial.covariance, rtol=1e-6, atol=1e-9
        )
        rows = {"all": 60, "statistics.npz": None, "both.npz": 30}[spec]
        assert (found.features is None) if rows is None else len(found.features) == rows


def test_a_reference_is_measured_once_and_again_when_it_changes(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    load = lambda: references.load_reference(  # noqa: E731
        "digits:test", extractor(), image_size=SIZE, cache=cache
    )
    first = load()
    assert first.count == 359
    assert [file.suffix for file in cache.iterdir()] == [".npz"]  # The partial results are gone.
    monkeypatch.setattr(FeatureExtractor, "__call__", lambda *_: pytest.fail("measured again"))
    np.testing.assert_array_equal(load().pool.covariance, first.pool.covariance)
    np.savez(tmp_path / "other.npz", images(9))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        references.load_reference(tmp_path / "other.npz", extractor(), image_size=SIZE, cache=cache)


def test_no_figure_depends_on_the_order_of_images(tmp_path, monkeypatch, small_chunks):
    """Neither of samples nor of a reference, of which precision and recall take a part."""
    monkeypatch.setattr(references, "MOST_NEIGHBOURS", 20)
    monkeypatch.setattr(distances.inception_score, "__defaults__", (16,))
    sets = {"reference": images(), "samples": images(48, seed=1)}
    rows = []
    for step in (1, 7):  # Every 7th, over and over: 7 divides neither number of images.
        for name, found in sets.items():
            np.savez(
                tmp_path / f"{name}{step}.npz", found[np.arange(len(found)) * step % len(found)]
            )
        reference = references.load_reference(
            tmp_path / f"reference{step}.npz", extractor(), image_size=SIZE, cache=tmp_path
        )
        assert len(reference.features) == 20
        samples = NpzImages(tmp_path / f"samples{step}.npz")
        out = tmp_path / f"out{step}"
        rows.append(generation.evaluate_images(samples, reference, extractor(), out))
    for name in generation.METRICS:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-6), name


def truncated(path):
    np.savez(path, images())
    path.write_bytes(path.read_bytes()[:-100])


def cut_inside(path):
    """Whole by its directory of members, but `arr_0` has fewer images than its header says."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (60, SIZE, SIZE, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(images(40).data)


def with_nan(path):
    data = images().astype(np.float32)
    data[0, 3, 3] = np.nan
    np.savez(path, data)


def damaged_statistics(path):
    mu = np.zeros(12)
    np.savez(path, mu=np.where(np.arange(12) == 5, np.nan, mu), sigma=np.eye(12))


WRONG = {
    "another resolution": (lambda p: np.savez(p, images(60, 24)), "24x24 px.*samples are 16x16"),
    "too few": (lambda p: np.savez(p, images(3)), "holds 3 images: at least 4 are needed"),
    "truncated": (truncated, "truncated or not an .npz"),
    "cut inside": (cut_inside, "arr_0 ends within images"),
    "NaN images": (with_nan, r"arr_0 is float32 \[60, 16, 16, 3\], expected uint8"),
    "float images": (lambda p: np.savez(p, images() / 255), "float64.*expected uint8"),
    "channels first": (
        lambda p: np.savez(p, np.moveaxis(images(), -1, 1)),
        r"uint8 \[60, 3, 16, 16\].*channels go last by moveaxis",
    ),
    "16 bits": (
        lambda p: np.savez(p, images().astype(np.uint16)),
        r"arr_0 is uint16.*0 to 255 become uint8 by x\.astype",
    ),
    "grey": (
        lambda p: np.savez(p, images()[..., 0]),
        r"uint8 \[60, 16, 16\], expected.* N > 0: grey becomes RGB by stack\(\[x, x, x\], -1\)$",
    ),
    "one channel": (
        lambda p: np.savez(p, images()[:, None, ..., 0] / 255),
        r"by moveaxis\(x, 1, -1\); grey becomes RGB by repeat\(x, 3, -1\)$",
    ),
    "transparency": (
        lambda p: np.savez(p, np.concatenate([images(), images()[..., :1]], -1)),
        r"\[60, 16, 16, 4\], expected.* > 0: RGBA is laid over white by 255 - \(255.0 - x\[..., :3",
    ),
    "one image": (lambda p: np.savez(p, images()[0]), r"a set of one by x\[None\]$"),
    "no pixels": (lambda p: np.savez(p, images()[:, :0]), r"uint8 \[60, 0, 16, 3\], expected"),
    "other names": (lambda p: np.savez(p, a=1, b=2), "holds a, b: expected mu with sigma"),
    "half": (lambda p: np.savez(p, mu=np.zeros(12)), "expected mu with sigma"),
    "NaN statistics": (damaged_statistics, "mu holds NaN"),
    "text": (lambda p: p.write_text("not found"), "truncated or not an .npz"),
    "missing": (lambda p: None, "there is no such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_references_are_refused(tmp_path, name):
    make, words = WRONG[name]
    make(tmp_path / "wrong.npz")
    with pytest.raises(EvaluationError, match=words):
        references.load_reference(
            tmp_path / "wrong.npz", extractor(), image_size=SIZE, cache=tmp_path / "cache"
        )


def test_samples_in_other_files_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    Image.fromarray(images()[0]).save(tmp_path / "folder" / "x.png")
    assert len(open_samples(f"folder:{tmp_path}/folder")) == 1
    np.savez(tmp_path / "x.npz", images())
    (tmp_path / "x.npz").rename(tmp_path / "x")
    assert len(open_samples(tmp_path / "x")) == 60
    np.save(tmp_path / "x.npy", images())
    for path in (tmp_path / "x.npy", tmp_path / "folder" / "x.png"):
        with pytest.raises(EvaluationError, match="is a file: expected a folder of pictures or an"):
            open_samples(path)


def test_wrong_folders_are_refused(tmp_path):
    def load():
        return references.load_reference(
            f"folder:{tmp_path}", extractor(), image_size=SIZE, cache=tmp_path / "cache"
        )

    with pytest.raises(EvaluationError, match=r"no such folder.*are mnist:train and mnist:test"):
        references.open_images("mnist", SIZE)
    with pytest.raises(EvaluationError, match="holds no pictures"):
        load()
    save_pictures(tmp_path, images(5, 12))
    with pytest.raises(EvaluationError, match=r"short side of 12 px.*16x16"):
        load()
    for file in tmp_path.glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(EvaluationError, match=r"none of its 5 images can be read.*004.png"):
        load()
    save_pictures(tmp_path, images(3, 20))
    with pytest.raises(EvaluationError, match="only 3 of 5 images can be read"):
        load()


def test_statistics_of_another_network_are_refused(tmp_path, small_chunks):
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    found = references.load_reference(
        tmp_path / "inception.npz", extractor(), image_size=SIZE, cache=tmp_path
    )
    np.savez(tmp_path / "samples.npz", images())
    with pytest.raises(EvaluationError, match="width 2048 and 12"):
        generation.evaluate_images(
            NpzImages(tmp_path / "samples.npz"), found, extractor(), tmp_path / "out"
        )
