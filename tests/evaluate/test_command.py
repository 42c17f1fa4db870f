"""`detailflow evaluate` from its command line."""

import json

import numpy as np
import pytest

import detailflow_jax as df
from detailflow_jax.evaluate import __main__ as command
from detailflow_jax.evaluate import image_quality
from detailflow_jax.evaluate.models import Reconstructor, Sampler
from scored_models import (
    SIZE,
    extractor,
    generator,
    images,
    mesh_of,
    save_pictures,
    tokenizer,
)


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
