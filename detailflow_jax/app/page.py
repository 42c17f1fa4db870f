"""The page of the app: one tab for each thing that the models can do."""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from detailflow_jax.app import studio as limits
from detailflow_jax.app.studio import Images, Studio, read_upload
from detailflow_jax.inference.checks import check_whole
from detailflow_jax.inference.errors import InputError
from detailflow_jax.runtime import extras, pictures
from detailflow_jax.runtime.errors import UserError

NO_CLASS = -1
_SHOWN = 192  # pixels of one image on the page, at least


def build(studio: Studio) -> Any:
    """The page, a `gradio.Blocks`, of the models that there are."""
    gr = extras.require("gradio")
    with gr.Blocks(title="detailflow", analytics_enabled=False) as page:
        gr.Markdown("# Images, coarse to fine")
        with gr.Tabs():
            if studio.generator:
                _tab("Generate", _generate, gr, studio)
                _tab("Vary", _vary, gr, studio)
                _tab("Upscale", _upscale, gr, studio)
            if studio.flowar:
                _tab("FlowAR", _sample_flowar, gr, studio)
                _tab("Inpaint", _inpaint, gr, studio)
    return page


def launch(page: Any, host: str, port: int, **options: Any) -> tuple[Any, str]:
    """Serves the page; returns what Gradio runs, and the address.

    One call of the models runs at a time, and few wait.
    """
    gr = extras.require("gradio")
    page.queue(max_size=16, default_concurrency_limit=1)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app, local, _ = page.launch(
        server_name=host,
        server_port=port or None,
        max_file_size=f"{limits.UPLOAD_MB}mb",
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=["gradio"],
        theme=theme,
        **options,
    )
    return app, local


# ----------------------------------------------------------------------------------------- the tabs


def _tab(title: str, fill: Callable[[Any, Studio], None], gr: Any, studio: Studio) -> None:
    with gr.Tab(title):
        fill(gr, studio)


@contextlib.contextmanager
def _columns(gr: Any, text: str, sizes: Sequence[int] = (1, 2)) -> Iterator[tuple[Any, Any]]:
    gr.Markdown(text)
    with gr.Row():
        with gr.Column(scale=sizes[0], min_width=280) as left:
            pass
        with gr.Column(scale=sizes[1], min_width=280) as right:
            pass
    yield left, right


def _common(gr: Any, guidance: float, count: int = 4) -> list[Any]:
    """Number of images, guidance, seed."""
    return [
        gr.Slider(1, limits.MOST_IMAGES, count, step=1, label="images"),
        gr.Slider(1.0, 10.0, guidance, step=0.05, label="guidance (1: none)"),
        gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31 - 1),
    ]


def _classes(gr: Any, studio: Studio, kind: str, *, optional: bool = False) -> Any:
    known = studio.classes(kind)
    choices = [("no class", NO_CLASS), *known] if optional else known
    return gr.Dropdown(choices, value=choices[0][1], label="class")


def _own(gr: Any, studio: Studio) -> list[Any]:
    """Temperature and flow steps; the one that the generator does not have is not shown."""
    return [
        gr.Slider(0.1, 2.0, 1.0, step=0.05, label="temperature", visible=not studio.flows),
        gr.Slider(2, limits.MOST_STEPS, 25, step=1, label="flow steps", visible=studio.flows),
    ]


def _upload(gr: Any, label: str) -> Any:
    """An upload, as the path of its file: `read_upload` says what is wrong with it."""
    sources = ["upload", "clipboard"]
    component = gr.Image(type="filepath", label=label, sources=sources, height=240)
    # Gradio would open the file, and fail without a word for people.
    component.preprocess = lambda payload: payload.path if payload else None
    return component


def _editor(gr: Any) -> Any:
    """An upload to paint over; see `parts_of`."""
    brush = gr.Brush(default_size=24, colors=["#e33"], color_mode="fixed")
    editor = gr.ImageEditor(
        type="numpy", label="image", sources=["upload", "clipboard"], transforms=(),
        layers=False, brush=brush, canvas_size=(512, 512),
    )  # fmt: skip
    opened = editor.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return opened(payload)
        except OSError as error:  # what Pillow raises of other files
            raise gr.Error("the upload is not readable: expected an image file") from error

    editor.preprocess = preprocess
    return editor


def _results(gr: Any) -> list[Any]:
    """Where a tab says what it does, and its picture."""
    return [
        gr.Markdown("Nothing sampled yet."),
        gr.Image(label="result", interactive=False, format="png", buttons=["download"]),
    ]


def _generate(gr: Any, studio: Studio) -> None:
    counts = studio.counts
    group, every = counts[0], counts[-1]
    text = (
        f"An image is {every} tokens, from global structure to fine detail. It is shown as soon "
        "as each group of them is sampled; afterwards the slider shows each again."
    )
    with _columns(gr, text) as (left, right):
        with left:
            label = _classes(gr, studio, "generator")
            inputs = [label, *_common(gr, 1.5), *_own(gr, studio)]
            button = gr.Button("Generate", variant="primary")
        with right:
            status, image = _results(gr)
            tokens = gr.Slider(group, every, every, step=group, label="tokens shown")
            grown = gr.State([])

    def generate(label, count, guidance, seed, temperature, steps):
        settings = studio.settings(temperature, steps)
        yield _starting(studio, "sample", count, guidance == 1, steps), None, every, []
        start, shown = time.perf_counter(), []
        for n, images in studio.grow(label, count, guidance, whole_seed(seed), **settings):
            shown = [*shown, _grid(images)]
            done = f"{n} of {every} tokens, {time.perf_counter() - start:.1f} s"
            yield done, shown[-1], n, shown

    def show(n, shown):
        if not shown:
            raise InputError("nothing to show yet: generate first")
        return shown[min(int(n) // group, len(shown)) - 1]

    outputs = [status, image, tokens, grown]
    button.click(_told(gr, generate), inputs, outputs, api_name="generate")
    # Only what a person moves: the stream moves the slider too.
    tokens.input(_told(gr, show), [tokens, grown], image, api_name="show", show_progress="hidden")


def _vary(gr: Any, studio: Studio) -> None:
    counts = studio.counts
    text = (
        "The first tokens of an image are kept, the others are sampled. Few keep the composition."
    )
    with _columns(gr, text) as (left, right):
        with left:
            upload = _upload(gr, "image")
            keep = gr.Slider(0, counts[-1], counts[0], step=1, label="tokens kept")
            label = _classes(gr, studio, "generator", optional=True)
            inputs = [upload, keep, label, *_common(gr, 1.5), *_own(gr, studio)]
            button = gr.Button("Vary", variant="primary")
        with right:
            outputs = _results(gr)

    def vary(path, keep, label, count, guidance, seed, temperature, steps):
        image, settings = read_upload(path), studio.settings(temperature, steps)
        yield _starting(studio, "vary", count, label == NO_CLASS or guidance == 1, steps), None
        arguments = int(keep), _label(label), count, guidance, whole_seed(seed)
        made, done = _timed(lambda: studio.vary(image, *arguments, **settings))
        yield f"{done}; {int(keep)} tokens are those of the upload", _grid(made)

    button.click(_told(gr, vary), inputs, outputs, api_name="vary")


def _upscale(gr: Any, studio: Studio) -> None:
    side = studio.tokenizer.config.image_size
    text = (
        f"A small image, of less than {side} px, gives the first tokens; the generator adds those "
        "of the detail. What it adds is invented."
    )
    with _columns(gr, text) as (left, right):
        with left:
            upload = _upload(gr, "small image")
            label = _classes(gr, studio, "generator", optional=True)
            inputs = [upload, label, *_common(gr, 1.5), *_own(gr, studio)]
            button = gr.Button("Upscale", variant="primary")
        with right:
            outputs = _results(gr)

    def upscale(path, label, count, guidance, seed, temperature, steps):
        image, settings = read_upload(path), studio.settings(temperature, steps)
        yield _starting(studio, "upscale", count, image.size, label == NO_CLASS, steps), None
        arguments = _label(label), count, guidance, whole_seed(seed)
        (start, made), done = _timed(lambda: studio.upscale(image, *arguments, **settings))
        yield f"{done}; from {start} to {side} px", _grid(made)

    button.click(_told(gr, upscale), inputs, outputs, api_name="upscale")


def _sample_flowar(gr: Any, studio: Studio) -> None:
    with _columns(gr, "Images of a class by FlowAR, scale by scale.") as (left, right):
        with left:
            label = _classes(gr, studio, "flowar")
            steps = gr.Slider(2, limits.MOST_STEPS, 25, step=1, label="flow steps per scale")
            inputs = [label, steps, *_common(gr, 2.4)]
            button = gr.Button("Generate", variant="primary")
        with right:
            outputs = _results(gr)

    def sample(label, steps, count, guidance, seed):
        yield _starting(studio, "flowar", count, steps, guidance == 1), None
        arguments = label, count, guidance, steps, whole_seed(seed)
        made, done = _timed(lambda: studio.sample_flowar(*arguments))
        yield done, _grid(made)

    button.click(_told(gr, sample), inputs, outputs, api_name="flowar")


def _inpaint(gr: Any, studio: Studio) -> None:
    text = "Paint over what is to be new. The middle square of the image is used."
    with _columns(gr, text, (1, 1)) as (left, right):
        with left:
            editor = _editor(gr)
            label = _classes(gr, studio, "flowar", optional=True)
            steps = gr.Slider(2, limits.MOST_STEPS, 25, step=1, label="flow steps per scale")
            inputs = [editor, label, steps, *_common(gr, 2.4)]
            button = gr.Button("Inpaint", variant="primary")
        with right:
            outputs = _results(gr)

    def inpaint(drawn, label, steps, count, guidance, seed):
        image, brushed = parts_of(drawn)
        yield _starting(studio, "inpaint", count, steps, label == NO_CLASS or guidance == 1), None
        arguments = _label(label), count, guidance, steps, whole_seed(seed)
        made, done = _timed(lambda: studio.inpaint(image, brushed, *arguments))
        yield done, _grid(made)

    button.click(_told(gr, inpaint), inputs, outputs, api_name="inpaint")


# ---------------------------------------------------------------------------------- what tabs share


def _told(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors of the user become one line on the page."""

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            line = " ".join(str(error).split())
            raise gr.Error(line, print_exception=False) from error

    if not inspect.isgeneratorfunction(function):
        return told()(function)

    @functools.wraps(function)
    def streamed(*arguments):
        with told():
            yield from function(*arguments)

    return streamed


def _starting(studio: Studio, what: str, *program: Any) -> str:
    """What is said before the models are called."""
    if studio.first_time(what, *program):
        return "Compiling for these settings. The first time takes a while, later ones do not…"
    return "Sampling…"


def _timed(function: Callable[[], Any]) -> tuple[Any, str]:
    start = time.perf_counter()
    result = function()
    return result, f"Done in {time.perf_counter() - start:.1f} s"


def _label(label: int) -> int | None:
    return None if label == NO_CLASS else label


def whole_seed(seed: float | None) -> int:
    """The seed; raises InputError unless it is a whole number that a PRNG key takes."""
    return check_whole("seed", seed, 0, 2**31 - 1)


def parts_of(drawn: Any) -> tuple[Any, np.ndarray]:
    """The picture of a `gradio.ImageEditor`, and where it was brushed, bool [H, W].

    Raises:
      InputError: there is no image.
    """
    background = drawn and drawn.get("background")
    if background is None:
        raise InputError("no image: upload one first")
    height, width = background.shape[:2]
    brushed = np.zeros((height, width), bool)
    for layer in drawn.get("layers") or []:
        if layer.shape[:2] != (height, width):
            found = " x ".join(map(str, layer.shape[:2]))
            raise InputError(f"the brushed mask is {found}, expected {height} x {width}")
        brushed |= layer[..., -1] > 0
    return limits.Picture.of(np.ascontiguousarray(background[..., :3])), brushed


def _grid(images: Images) -> np.ndarray:
    """One picture of all; small images are enlarged."""
    return pictures.grid(images, scale=max(1, _SHOWN // images.shape[1]))
