"""Scoring images, references and models: formats, refusals, resuming, and what must not matter."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import children
import detailflow_jax as df
from detailflow_jax.evaluate import __main__ as command
from detailflow_jax.evaluate import (
    chunks,
    distances,
    generation,
    image_quality,
    reconstruction,
    references,
)
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.models import Reconstructor, Sampler
from detailflow_jax.evaluate.samples import NpzImages, open_samples, write_samples
from detailflow_jax.ops import images as pixels
from scored_models import (
    SIZE,
    extractor,
    flowar,
    generator,
    images,
    mesh_of,
    save_pictures,
    tokenizer,
    vae,
)

SWEEP = {"num_samples": 40, "cfg_scales": (1.5,), "seeds": 2}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    np.savez(folder / "images.npz", images())
    found = references.load_reference(
        folder / "images.npz", extractor(), image_size=SIZE, cache=folder / "cache"
    )
    return found


# -------------------------------------------------------------------------------------- the .npz


def test_npz_has_the_published_layout_both_ways(tmp_path):
    data = images(5)
    write_samples(tmp_path / "ours.npz", data.shape, [data[:3], data[3:]])
    with np.load(tmp_path / "ours.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], data)
    np.savez(tmp_path / "theirs.npz", data)
    np.savez_compressed(tmp_path / "packed.npz", data, np.arange(5))
    for name in ("ours", "theirs", "packed"):
        found = NpzImages(tmp_path / f"{name}.npz")
        assert len(found) == 5 and found.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(found.read(1, 4), data[1:4])
    with pytest.raises(EvaluationError, match="5 images were given, expected 6"):
        write_samples(tmp_path / "short.npz", (6, *data.shape[1:]), [data])
    assert not (tmp_path / "short.npz").exists()


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
    "grey": (lambda p: np.savez(p, images()[..., 0]), r"uint8 \[60, 16, 16\], expected"),
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


@pytest.mark.full
def test_unreadable_images_are_skipped_counted_and_named(
    tmp_path, saved, small_chunks, monkeypatch, capsys, caplog
):
    """In samples, references and reconstructions, also the whole of a chunk; also when resumed."""
    monkeypatch.setattr(command, "load_extractor", lambda path, size: extractor(size))
    data, broken = images(50), [0, *range(16, 33), 40]
    readable = np.delete(np.arange(50), broken)
    save_pictures(tmp_path / "all", data)
    save_pictures(tmp_path / "readable", data[readable])
    for i in broken:
        file = tmp_path / "all" / f"{i:03d}.png"
        file.write_bytes(file.read_bytes()[:60])

    def run(name, *argv):
        out = ["--out", str(tmp_path / "out" / name), "--batch_size", "8"]
        assert command.main([*argv, *out]) == 0
        results = json.loads((tmp_path / "out" / name / "results.json").read_text())
        return results, capsys.readouterr().out

    rows = {}
    for name in ("all", "readable", "all"):
        folder = str(tmp_path / name)
        common = ["--reference", folder, "--cache", str(tmp_path / "cache")]
        results, printed = run(name, "generation", "--samples", folder, *common)
        named = [results["unreadable"], results["reference"]["unreadable"]]
        assert [len(names) for names in named] == [19 * (name == "all")] * 2
        assert f"{38 * (name == 'all')} unreadable" in printed
        rows[name] = {k: x for k, x in results["rows"][0].items() if not isinstance(x, str)}
    assert "017.png" in named[0][2]
    assert rows["all"]["num_samples"] == 31
    assert rows["all"] == pytest.approx(rows["readable"], rel=1e-5, abs=1e-9)
    for i in broken:
        assert f"{i:03d}.png" in caplog.text

    model = ["reconstruction", "--model", str(saved / "tok/model.safetensors"), "--without"]
    model += ["lpips", "--noise_groups", "1", "--reference", str(tmp_path / "all")]
    results, printed = run("reconstruction", *model)
    assert results["rows"][0]["images"] == 31 and "19 unreadable" in printed
    # The noise of an image depends on its place in the set.
    small = Reconstructor(tokenizer(), mesh_of(1), 4)
    made = small(data[readable], [8], [1], indices=readable)
    psnr = image_quality.psnr(made["group 1 noisy"], data[readable])
    assert results["rows"][1]["psnr"] == pytest.approx(float(np.mean(psnr)), rel=1e-5)


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


# ---------------------------------------------------------------------------- what must not matter


def scores_of(devices, batch_size, folder):
    """Every figure of a small sweep and of a reconstruction."""
    extract = extractor(batch_size, devices)
    np.savez(folder / "reference.npz", images())
    found = references.load_reference(
        folder / "reference.npz", extract, image_size=SIZE, cache=folder / "cache"
    )
    sampler = Sampler(generator(), tokenizer(), mesh_of(devices), batch_size)
    sweep = generation.Sweep(**SWEEP)
    rows = generation.evaluate_sweep(sampler, sweep, found, extract, folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    made = reconstruction.evaluate(
        Reconstructor(tokenizer(), mesh_of(devices), batch_size),
        NpzImages(folder / "reference.npz"),
        folder,
        counts=[2, 8],
        groups=[2],
        num_images=37,
        extractor=extract,
    )
    return {"generation": rows, "reconstruction": made, "parts": split(sampler)}


def split(sampler):
    """On how many devices a model's parameters lie."""
    return len(jax.tree.leaves(sampler.model.params)[0].sharding.device_set)


@pytest.mark.full
def test_scores_depend_on_neither_batch_size_nor_device_count(tmp_path):
    printed = children.run_on_eight_devices(__file__, tmp_path)
    on_eight, on_one = json.loads(printed.splitlines()[-1])
    assert (on_eight.pop("parts"), on_one.pop("parts")) == (8, 1)
    for command_name, rows in on_one.items():
        for row, other in zip(rows, on_eight[command_name], strict=True):
            for name, value in row.items():
                same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
                assert other[name] == same, name
    assert len({row["fid"] for row in on_one["generation"]}) == 2
    assert len({row["psnr"] for row in on_one["reconstruction"]}) == 4


# ------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def test_a_killed_sweep_goes_on_and_ends_with_the_same_figures(
    tmp_path, monkeypatch, reference, small_chunks
):
    sampler = Sampler(generator(), tokenizer(), mesh_of(1), 8)
    sweep = generation.Sweep(num_samples=40, cfg_scales=(1.5,), keep_images=True)
    made = []

    def run(out, limit):
        made.clear()
        call = Sampler.__call__

        def sample(self, labels, *, first_index, **settings):
            if len(made) == limit:
                raise Killed
            made.append(first_index)
            return call(self, labels, first_index=first_index, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "__call__", sample)
            return generation.evaluate_sweep(sampler, sweep, reference, extractor(), out)[0]

    whole = run(tmp_path / "whole", 9)
    assert made == [0, 8, 16, 24, 32]
    with pytest.raises(Killed):
        run(tmp_path / "killed", 3)
    resumed = run(tmp_path / "killed", 9)
    assert made == [16, 24, 32]
    again = run(tmp_path / "killed", 0)  # Nothing is left to make.
    for row in (whole, resumed, again):
        row.pop("seconds")
    assert whole == resumed == again
    files = [tmp_path / name / "samples-cfg1.5-seed0.npz" for name in ("whole", "killed")]
    assert np.array_equal(*(np.load(file)["arr_0"] for file in files))
    other = generation.Sweep(num_samples=40, cfg_scales=(1.5,), labels="random")
    with pytest.raises(EvaluationError, match="labels was 'balanced', is now 'random'"):
        generation.evaluate_sweep(sampler, other, reference, extractor(), tmp_path / "killed")
    # The images that were kept score as their samples did.
    score = generation.evaluate_images(NpzImages(files[0]), reference, extractor(), tmp_path)
    assert score["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    kept = np.load(files[0])["arr_0"]
    in_memory = generation.score_images(kept, reference, extractor())
    assert in_memory == pytest.approx({name: whole[name] for name in generation.METRICS})


def test_a_damaged_part_is_named(tmp_path, reference, small_chunks):
    np.savez(tmp_path / "samples.npz", images(40, seed=3))
    run = lambda: generation.evaluate_images(  # noqa: E731
        NpzImages(tmp_path / "samples.npz"), reference, extractor(), tmp_path
    )
    run()
    part = tmp_path / "samples" / "features-00001.npz"
    part.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(EvaluationError, match=r"features-00001.npz is damaged.*remove it"):
        run()


# ---------------------------------------------------------------------------------------- models


def test_balanced_labels_mix_classes_everywhere():
    labels = generation.class_labels("balanced", 50_000, 1000, seed=1)
    assert (np.bincount(labels) == 50).all()
    assert all((np.bincount(labels[i : i + 5000]) == 5).all() for i in range(0, 50_000, 5000))
    drawn = [generation.class_labels("random", 500, 10, seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert len(np.unique(drawn[0])) == 10
    with pytest.raises(EvaluationError, match="balanced, random"):
        generation.Sweep(labels="uniform")


def test_a_model_that_gives_nan_is_refused():
    broken = tokenizer()
    broken.params = jax.tree.map(lambda x: x * np.nan, broken.params)
    sampler = Sampler(generator(), broken, mesh_of(1), 8)
    with pytest.raises(EvaluationError, match=r"samples from 16 on.*NaN"):
        sampler(np.zeros(3, int), first_index=16, seed=0, cfg_scale=1.5)
    with pytest.raises(EvaluationError, match="a generator with a generator"):
        Sampler(generator(), generator(), mesh_of(1), 8)


def test_flowar_and_its_autoencoder(tmp_path):
    model, decoder = flowar(), vae()
    sampler = Sampler(model, decoder, mesh_of(1), 8, {"num_steps": 2})
    assert sampler.image_size == SIZE
    labels = np.array([0, 2, 1])
    made = sampler(labels, first_index=5, seed=1, cfg_scale=2.0)
    latents = model.sample(labels, seed=1, first_index=5, cfg_scale=2.0, num_steps=2)
    expected = np.asarray(pixels.to_uint8(decoder.decode(latents))).astype(int)
    assert np.abs(made - expected).max() <= 1 and made.std() > 1

    data = images(5)
    np.savez(tmp_path / "images.npz", data)
    reconstructor = Reconstructor(decoder, mesh_of(1), 8, image_size=SIZE)
    rows = reconstruction.evaluate(reconstructor, NpzImages(tmp_path / "images.npz"), tmp_path)
    latents = decoder.network.scale(decoder.encode(data)[0])
    whole = np.asarray(pixels.to_uint8(decoder.decode(latents)))
    assert rows[0]["name"] == "latents"
    assert rows[0]["psnr"] == pytest.approx(float(image_quality.psnr(whole, data).mean()), rel=1e-3)
    with pytest.raises(EvaluationError, match="a VAE has no tokens"):
        reconstruction.evaluate(
            reconstructor, NpzImages(tmp_path / "images.npz"), tmp_path, groups=[1]
        )


def test_reconstructions_by_tokens_and_with_noise(tmp_path):
    model, data = tokenizer(), images(11)
    reconstructor = Reconstructor(model, mesh_of(1), 8)
    made = reconstructor(data, [4, 8], [1, 3], indices=np.arange(len(data)))
    codes = model.encode(data)
    whole = np.asarray(pixels.to_uint8(model.decode(codes)))
    np.testing.assert_array_equal(made["8 tokens"], whole)
    # Noise in the last group leaves nothing to correct; before it, correction changes the rest.
    np.testing.assert_array_equal(made["group 3 noisy"], made["group 3 corrected"])
    assert not np.array_equal(made["group 1 noisy"], made["group 1 corrected"])
    noisy, corrected = reconstructor._noisy(data[:8], np.arange(8, dtype=np.int32), 1)
    np.testing.assert_array_equal(np.delete(noisy, [2, 3], 1), np.delete(codes[:8], [2, 3], 1))
    assert (noisy[:, 2:4] != codes[:8, 2:4]).any()
    np.testing.assert_array_equal(corrected[:, :4], noisy[:, :4])

    np.savez(tmp_path / "images.npz", data)

    def scores(distance, fingerprint):
        return reconstruction.evaluate(
            reconstructor,
            NpzImages(tmp_path / "images.npz"),
            tmp_path,
            counts=[8],
            groups=[1],
            perceptual=reconstruction.Perceptual(distance, fingerprint),
        )

    rows = scores(lambda x, y: jnp.abs(x - y).mean((1, 2, 3)), "file:1")
    assert [row["name"] for row in rows] == ["8 tokens", "group 1 noisy", "group 1 corrected"]
    assert rows[0]["psnr"] == pytest.approx(float(image_quality.psnr(whole, data).mean()), rel=1e-5)
    assert rows[0]["ssim_range_2"] > rows[0]["ssim"]
    assert rows[0]["lpips"] == pytest.approx(np.abs(whole / 127.5 - data / 127.5).mean(), rel=1e-5)
    zeros = lambda x, y: jnp.zeros(len(x))  # noqa: E731
    assert scores(zeros, "file:1") == rows  # resumed: nothing is computed anew
    with pytest.raises(EvaluationError, match="lpips"):
        scores(zeros, "file:2")
    with pytest.raises(EvaluationError, match=r"noise groups \[4\]: expected 0 to 3"):
        reconstruction.evaluate(
            reconstructor, NpzImages(tmp_path / "images.npz"), tmp_path, groups=[4]
        )


# --------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("tok", tokenizer()), ("gen", generator())):
        df.save_pytorch(model, folder / name / "model.safetensors")
    np.savez(folder / "reference.npz", images())
    return folder


def test_the_command_sweeps_draws_and_resumes(tmp_path, saved, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_extractor", lambda path, size: extractor(size))
    options = {
        "--batch_size": 8,
        "--model": saved / "gen/model.safetensors",
        "--decoder": saved / "tok/model.safetensors",
        "--reference": saved / "reference.npz",
        "--cache": tmp_path / "cache",
        "--out": tmp_path / "out",
        "--cfg_scale": "1.25,1.5",
        "--num_samples": 30,
        "--seeds": 2,
    }
    argv = ["generation", "--npz", *(str(x) for pair in options.items() for x in pair)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert "lowest FID at guidance" in printed and len(results["rows"]) == 4
    lines = results["summary"]["by_cfg_scale"]
    scales = (1.25, 1.5)
    fids = [np.mean([r["fid"] for r in results["rows"] if r["cfg_scale"] == s]) for s in scales]
    assert [line["fid"] for line in lines] == pytest.approx(fids)
    assert results["summary"]["best_cfg_scale"] == scales[int(np.argmin(fids))]
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "out/samples-cfg1.5-seed1.npz") as file:
        assert file["arr_0"].shape == (30, SIZE, SIZE, 3) and file["arr_0"].dtype == np.uint8
    monkeypatch.setattr(Sampler, "__call__", lambda *_, **__: pytest.fail("sampled again"))
    assert command.main(argv) == 0


def test_the_command_says_which_weights_are_missing(tmp_path, saved, capsys):
    samples = ["generation", "--samples", str(saved / "reference.npz"), "--reference", "digits"]
    inception = ["--inception", str(tmp_path / "none.pth"), "--out", str(tmp_path)]
    assert command.main([*samples, *inception]) == 2
    error = capsys.readouterr().err
    assert "none.pth" in error and "github.com/toshas/torch-fidelity" in error
    model = ["--model", str(saved / "tok/model.safetensors"), "--reference", "digits:test"]
    assert command.main(["reconstruction", *model, *inception]) == 2
    assert "vgg16-397923af.pth" in capsys.readouterr().err
    assert command.main([*samples, "--model", "runs/gen"]) == 2
    assert "either --samples, or --model" in capsys.readouterr().err


def test_the_command_reconstructs_without_further_weights(tmp_path, saved, capsys):
    argv = ["reconstruction", "--model", str(saved / "tok/model.safetensors")]
    argv += ["--reference", str(saved / "reference.npz"), "--num_tokens", "2,8"]
    argv += [
        "--noise_groups",
        "0",
        "--batch_size",
        "8",
        "--without",
        "rfid",
        "lpips",
        "--out",
        str(tmp_path),
    ]
    assert command.main(argv) == 0
    assert "group 0 corrected" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows[0]) == ["name", "images", "psnr", "ssim", "ssim_range_2"]


@pytest.mark.parametrize("kind", ["pixels", pytest.param("encoder", marks=pytest.mark.full)])
def test_features_without_a_download_have_names_of_their_own(tmp_path, saved, capsys, kind):
    """Their distance is small between parts of a set, and grows the more a set is changed."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (160, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    noise = rng.normal(0, 1, base[:80].shape)
    sets = {"reference": base[80:]}
    # Principal components average the noise of single pixels away; darkness stays.
    change = {
        "pixels": lambda x: base[:80] * (1 - x / 200),
        "encoder": lambda x: base[:80] + x * noise,
    }
    sets |= {f"changed{x}": np.clip(change[kind](x), 0, 255) for x in (0, 60, 120)}
    for name, found in sets.items():
        np.savez(tmp_path / f"{name}.npz", found.astype(np.uint8))
    options = ["--features", kind, "--cache", str(tmp_path / "cache"), "--batch_size", "16"]
    options += ["--reference", str(tmp_path / "reference.npz")]
    decoder = ["--decoder", str(saved / "tok/model.safetensors")]
    name = {"pixels": "fd_pixels", "encoder": "fd_tokenizer"}[kind]
    distances_ = []
    for samples in list(sets)[1:]:
        out = tmp_path / samples
        argv = ["generation", "--samples", str(tmp_path / f"{samples}.npz"), "--out", str(out)]
        assert command.main([*argv, *options, *decoder]) == 0
        row = json.loads((out / "results.json").read_text())["rows"][0]
        assert not {"fid", "sfid", "inception_score", "precision"} & row.keys()
        distances_.append(row[name])
    assert distances_ == sorted(distances_) and distances_[2] > 1.5 * distances_[0]
    if kind == "encoder":
        assert command.main([*argv, *options]) == 2
        assert "--features encoder needs --decoder" in capsys.readouterr().err
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    assert command.main([*argv, *options[:-1], str(tmp_path / "statistics.npz"), *decoder]) == 2
    assert "statistics" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("pixels", "fd_pixels"), ("encoder", "fd_tokenizer")])
def test_reconstructions_by_features_without_a_download(tmp_path, saved, capsys, kind, name):
    model = ["--model", saved / "tok/model.safetensors", "--without", "lpips", "--batch_size", "8"]
    reference = ["--reference", saved / "reference.npz", "--num_tokens", "2,8"]
    argv = ["reconstruction", *model, *reference, "--features", kind, "--out", tmp_path]
    assert command.main(list(map(str, argv))) == 0
    assert name in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    columns = ["name", "images", name, "psnr", "ssim", "ssim_range_2"]
    assert [list(row) for row in rows] == [columns] * 2
    assert all(np.isfinite(row[name]) and row[name] > 0 for row in rows)


def test_a_sweep_by_features_without_a_download(tmp_path, saved, capsys):
    models = ["--model", saved / "gen/model.safetensors", "--decoder", saved / "tok"]
    models = [*models[:3], saved / "tok/model.safetensors", "--reference", saved / "reference.npz"]
    sweep = ["--features", "pixels", "--cfg_scale", "1.25,1.5", "--num_samples", "12"]
    out = ["--cache", tmp_path / "cache", "--out", tmp_path / "out", "--batch_size", "8"]
    assert command.main(list(map(str, ["generation", *models, *sweep, *out]))) == 0
    assert "lowest fd_pixels at guidance" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["summary"]["distance"] == "fd_pixels"
    assert set(results["rows"][0]) >= {"fd_pixels", "precision_pixels", "recall_pixels"}


if __name__ == "__main__":
    chunks.CHUNK = 16
    runs = []
    for count, size in ((8, 16), (1, 5)):
        where = pathlib.Path(sys.argv[1]) / str(count)
        where.mkdir()
        runs.append(scores_of(count, size, where))
    print(json.dumps(runs))
