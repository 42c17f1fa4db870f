"""Images edited, varied and enlarged: what is kept, what is new, what is refused."""

import copy
import functools
import json

import numpy as np
import pytest
from PIL import Image

import detailflow_jax as df
import scored_models
from detailflow_jax.inference import api, edit, editing, upscale, vary
from detailflow_jax.runtime import pictures

LABELS = np.array([0, 1, 2])
SIDE = scored_models.SIZE
IMAGES = scored_models.images(3)
HOLE = np.zeros((SIDE, SIDE), bool)
HOLE[5:9, 6:12] = True


@pytest.fixture(scope="module")
def tok():
    return scored_models.tokenizer()


@pytest.fixture(scope="module")
def gen():
    return scored_models.generator()


@pytest.fixture(scope="module")
def vae():
    return scored_models.vae()


@pytest.fixture(scope="module")
def flow():
    return scored_models.flowar()


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_a_prefix_of_a_sample_gives_the_sample_again(gen, count):
    codes = gen.sample(LABELS, seed=3)
    assert np.array_equal(gen.sample(LABELS, seed=3, prefix=codes[:, :count]), codes)
    other = gen.sample(LABELS, seed=4, prefix=codes[:, :count])
    assert np.array_equal(other[:, :count], codes[:, :count])
    assert count == 8 or (other[:, count:] != codes[:, count:]).any()


def test_without_a_class_the_null_class_continues(gen):
    codes = gen.sample(LABELS, seed=3)[:, :2]
    found = gen.sample(None, seed=5, prefix=codes)
    assert found.shape == (3, 8) and np.array_equal(found[:, :2], codes)
    with pytest.raises(df.InputError, match="labels are missing"):
        gen.sample(None)


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_known_latents_are_kept_and_the_others_are_new(flow, solver):
    latents = np.random.default_rng(0).standard_normal((3, 4, 4, 3)).astype(np.float32)
    mask = np.zeros((3, 4, 4), bool)
    mask[:, 1:3, 2] = True
    found = flow.sample(LABELS, 0, 1.0, 2, solver=solver, latents=latents, mask=mask)
    assert np.array_equal(found[~mask], latents[~mask])
    assert (found[mask] != latents[mask]).all()


def test_what_is_kept_changes_what_is_new(flow):
    rng = np.random.default_rng(0)
    mask = np.zeros((3, 4, 4), bool)
    mask[:, 1:3, 2] = True
    one, other = (
        flow.sample(LABELS, 0, 1.0, 2, latents=latents, mask=mask)
        for latents in rng.standard_normal((2, 3, 4, 4, 3)).astype(np.float32)
    )
    assert np.abs(one - other)[mask].max() > 0.1


def test_outside_of_the_mask_the_image_is_its_reconstruction(vae, flow):
    found = df.edit(vae, flow, IMAGES, HOLE, LABELS, cfg_scale=1.0, num_steps=2)
    rebuilt = vae.decode(vae.encode(IMAGES))
    assert np.array_equal(found[:, ~HOLE], rebuilt[:, ~HOLE])
    assert np.abs(found - rebuilt)[:, HOLE].max() > 0.1


@pytest.mark.slow
def test_a_mask_of_everything_is_a_plain_sample(flow):
    latents, mask = np.zeros((3, 4, 4, 3), np.float32), np.ones((3, 4, 4), bool)
    found = flow.sample(LABELS, num_steps=2, latents=latents, mask=mask)
    want = flow.sample(LABELS, num_steps=2)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_variations_share_the_kept_tokens(tok, gen):
    codes = tok.encode(IMAGES)
    assert np.array_equal(df.vary(tok, gen, IMAGES, LABELS, keep=8), tok.decode(codes))
    want = gen.sample(LABELS, seed=2, prefix=codes[:, :4])
    assert np.array_equal(df.vary(tok, gen, IMAGES, LABELS, 4, seed=2), tok.decode(want))


def test_small_images_give_the_tokens_of_their_size(tok, gen):
    small = IMAGES[:, ::2, ::2]  # 8 px, which 2 tokens stand for
    codes = tok.encode(small)[:, :2]
    want = tok.decode(gen.sample(None, seed=1, prefix=codes))
    assert np.array_equal(df.upscale(tok, gen, small, seed=1), want)


def test_small_images_can_be_enlarged_before_they_are_encoded(tok, gen):
    flat = np.broadcast_to(IMAGES[:, :1, :1], IMAGES.shape)  # equal at every size
    want = df.vary(tok, gen, flat, LABELS, keep=2, seed=1)
    found = df.upscale(tok, gen, flat[:, ::2, ::2], LABELS, 1, enlarged=True)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)


def test_an_image_on_a_canvas():
    small = IMAGES[:, :8, :10]
    canvas, mask = editing.on_canvas(small, SIDE)
    assert np.array_equal(canvas[:, ~mask].reshape(small.shape), small)
    assert mask.sum() == SIDE * SIDE - 80
    with pytest.raises(df.InputError, match="expected smaller ones than the 16 px"):
        editing.on_canvas(IMAGES, SIDE)


def test_what_cannot_be_used_is_refused(tok, gen, vae, flow, unchecked):
    for mask, found in (
        (np.zeros_like(HOLE), "the mask is empty"),
        (HOLE[:8], r"the mask is bool \(3, 8, 16\), expected 3 masks of 16 x 16"),
        (HOLE.astype(int), "the mask is int64"),
    ):
        with pytest.raises(df.InputError, match=found):
            df.edit(vae, flow, IMAGES, mask, LABELS)
    with pytest.raises(df.InputError, match="images are 8 x 8, expected 16 x 16"):
        df.edit(vae, flow, IMAGES[:, :8, :8], HOLE, LABELS)
    with pytest.raises(df.InputError, match=r"expected \[B, H, W, 3\]"):
        df.edit(vae, flow, IMAGES[..., :1], HOLE, LABELS)
    stranger = copy.copy(flow)
    stranger.encoded_by = "f" * 32
    with pytest.raises(df.InputError, match="14 x 16, expected sides that are multiples of "):
        df.vary(tok, gen, IMAGES[:, :14], LABELS, keep=4)
    with pytest.raises(df.InputError, match="do not belong together"):
        df.edit(vae, stranger, IMAGES, HOLE, LABELS)
    with pytest.raises(df.InputError, match="keep=9, expected a whole number from 0 to 8"):
        df.vary(tok, gen, IMAGES, LABELS, keep=9)
    with pytest.raises(df.InputError, match=r"keep=2\.5, expected a whole number from 0 to 8"):
        df.vary(tok, gen, IMAGES, LABELS, keep=2.5)
    with pytest.raises(df.InputError, match="4 px: no token count decodes to 4 px"):
        df.upscale(tok, gen, IMAGES[:, :4, :4])
    with pytest.raises(df.InputError, match="expected at most 4"):
        gen.sample(LABELS, num_tokens=4, prefix=tok.encode(IMAGES))
    with pytest.raises(df.InputError, match="belong together: give both"):
        flow.sample(LABELS, mask=HOLE)


# -------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok, gen, vae, flow):
    """Models and images in files."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("tok", tok), ("gen", gen), ("vae", vae), ("flow", flow)):
        df.save_pytorch(model, root / name / "x.safetensors")
    pictures.save_png(root / "cat.png", IMAGES[0])
    pictures.save_png(root / "small.png", IMAGES[1, ::2, ::2])
    pictures.save_png(root / "mask.png", np.repeat(255 * HOLE[..., None], 3, 2).astype(np.uint8))
    (root / "text.png").write_text("no image")
    wide, aside = np.zeros((2, SIDE, 3 * SIDE, 3), np.uint8)
    aside[:, :4] = 255  # The middle square, which is used, is not white.
    pictures.save_png(root / "wide.png", wide)
    pictures.save_png(root / "aside.png", aside)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tokenizer", "load_generator", "load_vae", "load_flowar"):
            patch.setattr(api, name, functools.cache(getattr(api, name)))  # Loaded once.
        yield root


@pytest.fixture
def call(folder, tmp_path):
    """Runs a command on the models; names of images stand for those in the folder."""

    def call(command, *words):
        models = ("vae", "flow") if command is edit else ("tok", "gen")
        options = ("--vae", "--flowar") if command is edit else ("--tokenizer", "--generator")
        for option, model in zip(options, models, strict=True):
            words += (option, f"{folder / model}/x.safetensors")
        paths = (str(folder / w) if w.endswith(".png") else w for w in words)
        return command.main(["--out", str(tmp_path / "out"), *paths])

    return call


def result(tmp_path, name):
    return np.asarray(Image.open(tmp_path / "out" / name))


@pytest.mark.slow
def test_edit_paints_where_the_mask_is_white(call, vae, tmp_path):
    few = ("--count", "2", "--num_steps", "2", "--label", "1")
    assert call(edit, "--image", "cat.png", "--mask", "mask.png", *few) == 0
    rebuilt = df.to_uint8(vae.decode(vae.encode(IMAGES[:1])))[0]
    for name in ("cat_0.png", "cat_1.png"):
        assert np.array_equal(result(tmp_path, name)[~HOLE], rebuilt[~HOLE])
    assert (result(tmp_path, "cat_0.png") != result(tmp_path, "cat_1.png")).any()
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert said["made_by"]["vae"]["fingerprint"] == vae.fingerprint


@pytest.mark.slow
def test_edit_paints_in_a_box_or_around(call, tmp_path):
    few = ("--image", "cat.png", "--count", "1", "--num_steps", "2")
    assert call(edit, *few, "--box", "0,0,0.5,0.5") == 0
    assert call(edit, *few, "--outpaint", "0.5", "--label", "2") == 0
    assert result(tmp_path, "cat_0.png").shape == (SIDE, SIDE, 3)


@pytest.mark.slow
def test_vary_and_upscale_write_their_results(call, tmp_path):
    assert call(vary, "--image", "cat.png", "small.png", "--keep", "2", "--label", "1") == 0
    assert len(list((tmp_path / "out").glob("*_?.png"))) == 8
    assert call(upscale, "--image", "small.png", "--count", "2", "--enlarged") == 0
    assert result(tmp_path, "small_1.png").shape == (SIDE, SIDE, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words", "found"),
    [
        (edit, "--image cat.png --mask small.png", "expected equal sizes"),
        (edit, "--image wide.png --mask aside.png", "aside.png: the mask is empty"),
        (edit, "--image cat.png --box 0.5,0.5,0.51,0.6", "holds no pixel of the 16 x 16"),
        (edit, "--image text.png --box 0,0,1,1", "text.png"),
        (edit, "--image none.png --box 0,0,1,1", "none.png"),
        (edit, "--image cat.png --box 0,0,1,1 --label 7", "out of range, expected 0..2"),
        (vary, "--image cat.png --keep 3 --label 0,1", "expected one class"),
        (upscale, "--image cat.png", "16 px is no less than the 16 px"),
        (upscale, "--image cat.png --size 4", "4 px is too small for one token"),
        (upscale, "--image cat.png small.png --size 12", "the smallest image has 8 px"),
    ],
)
def test_a_command_says_what_is_wrong_in_one_line(call, command, words, found, capsys, tmp_path):
    assert call(command, *words.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert found in said[-1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "words", "found"),
    [
        (edit, "--box 0,0,2,1", "'2': expected a share between 0 and 1"),
        (edit, "--box 0,0,1", "expected left,top,right,bottom"),
        (edit, "--outpaint x", "'x': expected a share"),
        (edit, "--outpaint 1", "'1': expected a share above 0 and below 1"),
        (edit, "--mask a.png --box 0,0,1,1", "not allowed with argument"),
        (edit, "", "one of the arguments --mask --box --outpaint is required"),
        (vary, "--keep 3 --count 0", "'0': expected a whole number of at least 1"),
        (vary, "--keep 2.5", "'2.5': expected a whole number of at least 0"),
        (vary, "--keep 3 --seed -1", "'-1': expected a whole number from 0 to 4294967295"),
        (vary, "--keep 3 --cfg_scale inf", "'inf': expected a number of at least 1"),
        (upscale, "--size 0", "'0': expected a whole number of at least 1"),
    ],
)
def test_a_command_line_is_checked_before_anything_is_loaded(call, command, words, found, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(command, "--image", "cat.png", *words.split())
    assert found in capsys.readouterr().err
