"""The app, served on this machine and called through Gradio's own client."""

import itertools
import pathlib
import socket

import gradio_client
import numpy as np
import pytest
from PIL import Image

import scored_models
from detailflow_jax.app import __main__ as command
from detailflow_jax.app import page, studio
from detailflow_jax.inference.errors import InputError
from detailflow_jax.runtime import extras

SIZE, OWN = scored_models.SIZE, (1.0, 25)  # temperature, flow steps


@pytest.fixture(scope="module")
def models():
    made = {kind: getattr(scored_models, kind)() for kind in ("tokenizer", "generator")}
    made |= {kind: getattr(scored_models, kind)() for kind in ("vae", "flowar")}
    return studio.Studio(**made, names={"generator": ["ant", "bee", "cow"]})


@pytest.fixture(scope="module")
def served(models):
    built = page.build(models)
    _, address = page.launch(built, "127.0.0.1", 0, prevent_thread_lock=True)
    yield address
    built.close()


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    made = gradio_client.Client(served, verbose=False, download_files=str(folder))
    yield made
    made.close()


def write(path, side, kind="png"):
    path = pathlib.Path(path) / f"{side}.{kind}"
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def read(result):
    return np.asarray(Image.open(result).convert("RGB"))


def test_images_grow_while_tokens_are_shown(client):
    job = client.submit(1, 2, 1.5, 3, *OWN, api_name="/generate")
    job.result()
    updates = job.outputs()
    statuses = [update[0] for update in updates]
    assert statuses[0].startswith("Compiling for these settings") and updates[0][1] is None
    assert [text.split(",")[0] for text in statuses[1:]] == [
        f"{n} of 8 tokens" for n in (2, 4, 6, 8)
    ]
    assert [update[2] for update in updates[1:]] == [2, 4, 6, 8]
    pictures = [read(update[1]) for update in updates[1:]]
    assert all((a != b).any() for a, b in itertools.pairwise(pictures))
    for tokens, picture in ((2, pictures[0]), (6, pictures[2])):
        np.testing.assert_array_equal(read(client.predict(tokens, api_name="/show")), picture)
    # The same seed again, now without compiling: the same picture.
    again = client.submit(1, 2, 1.5, 3, *OWN, api_name="/generate")
    np.testing.assert_array_equal(read(again.result()[1]), pictures[-1])
    assert again.outputs()[0][0] == "Sampling…"


def test_uploads_are_varied_and_enlarged(client, tmp_path):
    for name, side, arguments, said in (
        ("/vary", 40, (4, -1), "4 tokens are those of the upload"),
        ("/upscale", 9, (2,), "from 8 to 16 px"),
    ):
        upload = gradio_client.handle_file(write(tmp_path, side))
        status, picture = client.predict(upload, *arguments, 2, 1.5, 0, *OWN, api_name=name)
        assert status.startswith("Done in") and said in status
        assert read(picture).shape[0] > SIZE


def drawn(tmp_path, side=32, brushed=None, layer_side=None):
    """What the editor sends: an image, and a layer that is opaque where it was brushed."""
    layer = np.zeros((layer_side or side, layer_side or side, 4), np.uint8)
    if brushed:
        layer[brushed] = 255
    path = tmp_path / "layer.png"
    Image.fromarray(layer).save(path)
    background = gradio_client.handle_file(write(tmp_path, side))
    layer = gradio_client.handle_file(str(path))
    return {"background": background, "layers": [layer], "composite": None}


def test_what_is_brushed_is_new(client, models, tmp_path):
    half = np.s_[:, :16]
    value = drawn(tmp_path, brushed=half)
    status, picture = client.predict(value, -1, 4, 1, 1.0, 0, api_name="/inpaint")
    assert status.startswith("Done in")
    scale = 192 // SIZE
    shown = read(picture)[2 : 2 + scale * SIZE : scale, 2 : 2 + scale * SIZE : scale]
    small = studio.center_crop(np.asarray(Image.open(write(tmp_path, 32))), SIZE)
    kept = studio.api.to_uint8(models.vae.decode(models.vae.encode(small[None])))[0]
    np.testing.assert_array_equal(shown[:, 9:], kept[:, 9:])
    assert np.abs(shown[:, :7].astype(int) - kept[:, :7]).max() > 8


def test_flowar_samples(client):
    status, picture = client.predict(2, 4, 2, 2.4, 0, api_name="/flowar")
    assert status.startswith("Done in") and read(picture).ndim == 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("/vary", ("text", 4, -1, 1, 1.5, 0), "expected an image file"),
        ("/vary", (None, 4, -1, 1, 1.5, 0), "no image: upload one first"),
        ("/vary", (40, 4, -1, 17, 1.5, 0), "17"),
        ("/vary", (40, 4, -1, 1, 0.5, 0), "0.5"),
        ("/upscale", (16, 0, 1, 1.5, 0), "16 px is no less than the 16 px"),
        ("/upscale", (4, 0, 1, 1.5, 0), "4 px is too small for one token"),
        ("/inpaint", ("text", 0, 4, 1, 1.5, 0), "expected an image file"),
        ("/inpaint", ("empty", 0, 4, 1, 1.5, 0), "nothing is brushed"),
        ("/inpaint", ("other", 0, 4, 1, 1.5, 0), "the brushed mask is 9 x 9, expected 32 x 32"),
        ("/inpaint", (None, 0, 4, 1, 1.5, 0), "no image: upload one first"),
    ],
)
def test_what_cannot_be_is_one_line(client, tmp_path, name, arguments, message):
    first, *rest = arguments
    if first == "text":
        (tmp_path / "words.png").write_text("words")
        first = gradio_client.handle_file(str(tmp_path / "words.png"))
        if name == "/inpaint":
            first = {"background": first, "layers": [], "composite": None}
    elif isinstance(first, int):
        first = gradio_client.handle_file(write(tmp_path, first))
    elif first in ("empty", "other"):
        first = drawn(tmp_path, layer_side=9 if first == "other" else None)
    own = () if name == "/inpaint" else OWN
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        client.predict(first, *rest, *own, api_name=name)
    text = str(caught.value)
    assert message in text and "\n" not in text and "Traceback" not in text


def test_it_is_served_to_this_machine_alone(served):
    assert served.startswith("http://127.0.0.1:")
    port = int(served.rstrip("/").rpartition(":")[2])
    other = next(
        (x[4][0] for x in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
         if not x[4][0].startswith("127.")), None,
    )  # fmt: skip
    if other:
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=2).close()
    assert command.parse([]).host == "127.0.0.1"


def test_which_models_are_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 2
    assert "no models: run `make demo` first" in capsys.readouterr().err
    with pytest.raises(InputError, match="--generator is missing"):
        command.chosen(command.parse(["--tokenizer", "a"]))
    for kind in ("tokenizer", "generator"):
        (tmp_path / "runs/demo" / kind).mkdir(parents=True)
    assert command.chosen(command.parse([])) == {
        "tokenizer": "runs/demo/tokenizer",
        "generator": "runs/demo/generator",
    }
    given = command.chosen(command.parse(["--vae", "a", "--flowar", "b"]))
    assert given == {"vae": "a", "flowar": "b"}


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(name, name="gradio")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    assert command.main([]) == 2
    assert "detailflow_jax[app]" in capsys.readouterr().err
