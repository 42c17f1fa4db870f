"""Trained models in the browser, to play with.

    detailflow app --tokenizer runs/tok --generator runs/gen
    detailflow app --vae runs/vae --flowar runs/flowar

Without models it takes those of `make demo` and, if they are there, of `make demo-flowar`. The page
is served to this machine only, unless --host says otherwise; anyone who reaches it may use it.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from detailflow_jax.app import page
from detailflow_jax.app.studio import Studio
from detailflow_jax.data.classes import class_names
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.generate import LOAD
from detailflow_jax.runtime import extras, files, platforms
from detailflow_jax.runtime.command import make_parser, whole
from detailflow_jax.runtime.errors import UserError

PAIRS = (("tokenizer", "generator", "runs/demo"), ("vae", "flowar", "runs/demo-flowar"))
"""A decoder, what samples for it, and the demo that trains both."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line."""
    about = "Trained models in the browser. Without models: those of `make demo`."
    parser = make_parser("app", about)
    for decoder, model, demo in PAIRS:
        for kind in (decoder, model):
            text = f"what df.load_{kind} takes; without any model: {demo}/{kind}"
            parser.add_argument(f"--{kind}", help=text)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address (default: %(default)s); 0.0.0.0 serves all networks",
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=7860, help="(default: %(default)s); 0: any free one"
    )
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> dict[str, str]:
    """Kind -> path of the models to load.

    Raises:
      InputError: half of a pair, or nothing is given and no demo was run.
    """
    given = {kind: getattr(args, kind) for pair in PAIRS for kind in pair[:2]}
    found = {}
    for decoder, model, demo in PAIRS:
        if bool(given[decoder]) != bool(given[model]):
            missing = model if given[decoder] else decoder
            raise InputError(f"--{missing} is missing: a {decoder} and a {model} go together")
        pair = {kind: given[kind] for kind in (decoder, model)}
        if not any(given.values()):
            pair = {kind: f"{demo}/{kind}" for kind in (decoder, model)}
            if not all(files.is_dir(path) for path in pair.values()):
                continue
        found |= {kind: path for kind, path in pair.items() if path}
    if not found:
        raise InputError(
            "no models: run `make demo` first, or give --tokenizer and --generator, or --vae and "
            "--flowar"
        )
    return found


def load(paths: dict[str, str]) -> Studio:
    """The models at these paths."""
    names = {}
    for kind in ("generator", "flowar"):
        with contextlib.suppress(UserError):
            if files.is_dir(paths.get(kind, "")):
                names[kind] = class_names(paths[kind])
    return Studio(**{kind: LOAD[kind](path) for kind, path in paths.items()}, names=names)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is interrupted; returns the exit code."""
    args = parse(argv)
    try:
        extras.require("gradio")  # Before the models are read.
        built = page.build(load(chosen(args)))
        _, address = page.launch(built, args.host, args.port, prevent_thread_lock=True)
    except UserError as error:
        return error.report()
    except OSError as error:
        return InputError(f"cannot serve on {args.host}:{args.port}: {error}").report()
    print(f"the app is at {address} (Ctrl-C ends it)", flush=True)
    built.block_thread()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    platforms.choose(tell=True)
    sys.exit(main())
