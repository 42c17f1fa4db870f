"""Scores of models: what they do not depend on, how a sweep goes on, reconstructions."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import children
from detailflow_jax.evaluate import (
    chunks,
    generation,
    image_quality,
    reconstruction,
    references,
)
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.models import Reconstructor, Sampler
from detailflow_jax.evaluate.samples import NpzImages
from detailflow_jax.ops import images as pixels
from scored_models import (
    SIZE,
    extractor,
    flowar,
    generator,
    images,
    mesh_of,
    tokenizer,
    vae,
)

SWEEP = {"num_samples": 40, "cfg_scales": (1.5,), "seeds": 2}


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
    features = {name: [rows] for name, rows in extractor()(kept).items()}
    in_memory = generation.score(features.get, reference, extractor().mesh)
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


if __name__ == "__main__":
    chunks.CHUNK = 16
    runs = []
    for count, size in ((8, 16), (1, 5)):
        where = pathlib.Path(sys.argv[1]) / str(count)
        where.mkdir()
        runs.append(scores_of(count, size, where))
    print(json.dumps(runs))
