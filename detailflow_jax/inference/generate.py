"""Generated images: labels -> codes or latents -> pictures.

    detailflow generate --tokenizer runs/tok --generator runs/gen --labels 0-9 \\
        --per_class 8 --cfg_scale 1.5 --out runs/samples
    detailflow generate --vae runs/vae --flowar runs/flowar --labels 0-9 \\
        --per_class 8 --cfg_scale 2.4 --num_steps 25 --out runs/samples

Writes `samples.npz` (`arr_0` uint8 [B, H, W, 3], and `labels`), `samples.json` (which models made
them, with their fingerprints, and the arguments), `grid.png`, on request one PNG per image, and
with several token counts `progressive.png`: the same samples from fewer and more tokens.

Shapes: B samples, H x W pixels.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped, UInt8
from tqdm import tqdm

from detailflow_jax.data.classes import class_names, parse_labels
from detailflow_jax.inference import api, rules
from detailflow_jax.inference.batching import over_processes
from detailflow_jax.inference.checks import check_labels
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.inference.errors import as_input_error
from detailflow_jax.inference.sampling import DECODERS
from detailflow_jax.ops.objectives import GRIDS
from detailflow_jax.runtime import distributed, files, pictures
from detailflow_jax.runtime.command import make_parser, number, seed, several, whole
from detailflow_jax.runtime.errors import ConfigError, reported
from detailflow_jax.runtime.files import write_atomically

Images = UInt8[np.ndarray, "B H W 3"]
LOAD: Mapping[str, Callable[[str], Any]] = {
    "tokenizer": api.load_tokenizer,
    "generator": api.load_generator,
    "vae": api.load_vae,
    "flowar": api.load_flowar,
}
SETTINGS = {
    "generator": ("gradual_cfg", "temperature", "top_k", "top_p", "greedy", "continuous"),
    "flowar": ("guidance_high", "solver"),
}
"""What samples -> options that its `sample` takes as they are."""


def sample(
    model: "api.Generator | api.FlowAR",
    labels: Int[np.ndarray, " B"],
    *,
    batch_size: int,
    **options: Any,
) -> Shaped[np.ndarray, "B ..."]:
    """`model.sample` behind a progress bar: codes [B, n], or latents [B, S, S, C].

    Several processes share the samples between them; each gets them all.
    """

    def run(first: int, own: np.ndarray) -> np.ndarray:
        parts = []
        with tqdm(total=len(own), unit="image", desc="sample", disable=first > 0) as progress:
            for start in range(0, len(own), batch_size):
                part, index = own[start : start + batch_size], first + start
                parts.append(
                    model.sample(part, first_index=index, batch_size=batch_size, **options)
                )
                progress.update(len(part))
        return np.concatenate(parts)

    return over_processes(run, labels)


def write_outputs(
    out: str,
    labels: Int[np.ndarray, " B"],
    images: Images,
    progressive: Mapping[int, UInt8[np.ndarray, "few H W 3"]],
    *,
    columns: int,
    single: bool,
) -> None:
    """Writes the pictures and samples.npz, each atomically."""
    folder = files.path(out)
    for name in ("", "images") if single else ("",):
        files.make_folder(folder / name)
    scale = max(1, 64 // images.shape[1])
    pictures.save_png(folder / "grid.png", pictures.grid(images, columns=columns, scale=scale))
    if progressive:
        rows = np.concatenate(list(progressive.values()))
        captions = [f"{count} tokens" for count in progressive]
        width = len(rows) // len(progressive)
        strip = pictures.grid(rows, columns=width, scale=scale, row_captions=captions)
        pictures.save_png(folder / "progressive.png", strip)
    if single:
        for i, (label, image) in enumerate(zip(labels, images, strict=True)):
            pictures.save_png(folder / "images" / f"{i:06d}_class{label:04d}.png", image)
    stream = io.BytesIO()
    np.savez(stream, images, labels=labels)
    write_atomically(folder / "samples.npz", stream.getvalue())


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line."""
    parser = make_parser(
        "generate",
        description="Generate images of given classes, with DetailFlow (--tokenizer, --generator) "
        "or with FlowAR (--vae, --flowar).",
    )
    add = parser.add_argument
    add("--out", required=True, help="folder, also gs://..., for the pictures and samples.npz")
    add("--labels", required=True, help="classes, as 0-9 or dog,cat; see detailflow classes")
    add("--per_class", type=whole(1), default=8, help="samples per class")
    add(
        "--cfg_scale", type=number(1), help="guidance >= 1; 1 means none (default: 1.5, FlowAR 2.4)"
    )
    add("--seed", type=seed, default=0, help="sample i depends on the seed and i alone")
    add("--batch_size", type=whole(1), default=64, help="samples per call of the compiled program")
    add("--single", action="store_true", help="also write every image as a PNG of its own")
    _add_detailflow(parser.add_argument_group("DetailFlow").add_argument)
    _add_flowar(parser.add_argument_group("FlowAR").add_argument)
    distributed.add_arguments(parser)
    args = parser.parse_args(argv)
    pairs = [(args.tokenizer, args.generator), (args.vae, args.flowar)]
    if sorted(map(bool, pairs[0])) == sorted(map(bool, pairs[1])) or not any(map(all, pairs)):
        parser.error("expected either --tokenizer and --generator, or --vae and --flowar")
    return args


def _add_detailflow(add: Any) -> None:
    add("--tokenizer", help="what df.load_tokenizer takes, such as a workdir")
    add("--generator", help="what df.load_generator takes, such as a workdir")
    add(
        "--num_tokens",
        type=several(whole(1)),
        help="token counts, as 4,8,16; the largest gives samples.npz and grid.png",
    )
    add("--gradual_cfg", action="store_true", help="lower the guidance group by group")
    rules.add_arguments(add)
    add("--greedy", action="store_true", help="always take the most likely code")
    add("--continuous", action="store_true", help="of a flow head: decode its vectors as they are")


def _add_flowar(add: Any) -> None:
    add("--vae", help="what df.load_vae takes, such as a workdir or kl16.ckpt")
    add("--flowar", help="what df.load_flowar takes, such as a workdir or FlowAR-L.pth")
    text = "flow steps, one number or one per scale, as 25,20,15; also of a generator's flow head"
    add("--num_steps", type=several(whole(1)), help=f"{text} (default: 25)")
    add(
        "--guidance_high",
        type=number(0, 1),
        default=0.9,
        help="guide from this time on (1 is noise)",
    )
    add("--solver", choices=GRIDS, help="default: euler, or ddim if the model predicts noise")


def generate(args: argparse.Namespace) -> Images:
    """Generates what the arguments say, writes it, returns the images.

    Raises:
      InputError: a label, count or setting that the models do not allow, or models that do not
        belong together.
    """
    files.check_folder(args.out)  # Before the sampling.
    kind = "flowar" if args.flowar else "generator"
    counts: list[int] = sorted({*(args.num_tokens or ())}) if kind == "generator" else []
    steps = args.num_steps
    decoder, model = (LOAD[name](getattr(args, name)) for name in (DECODERS[kind], kind))
    api.check_pair(decoder, model)
    labels = np.repeat(labels_of(args.labels, model), args.per_class)
    check_labels(labels, model.config.num_classes)
    with as_input_error("--num_tokens: "):
        for count in counts:
            decoder.config.resolutions.check(count)

    settings = {name: getattr(args, name) for name in SETTINGS[kind]}
    if steps is not None:
        settings["num_steps"] = steps[0] if len(steps) == 1 else steps
    if counts:
        settings["num_tokens"] = counts[-1]
    if args.cfg_scale is not None:
        settings["cfg_scale"] = args.cfg_scale
    samples = sample(model, labels, batch_size=args.batch_size, seed=args.seed, **settings)
    images = api.to_uint8(decoder.decode(samples))
    progressive = {}
    if len(counts) > 1:
        few = samples[:16]
        progressive = {n: api.to_uint8(decode_enlarged(decoder, few, n)) for n in counts}
    if jax.process_index() == 0:
        columns, single = args.per_class, args.single
        write_outputs(args.out, labels, images, progressive, columns=columns, single=single)
        write_origin(files.path(args.out) / "samples.json", (decoder, model), args)
    return images


def write_origin(
    path: files.PathLike, models: Sequence[api.Model], args: argparse.Namespace
) -> None:
    """Writes which models made the pictures, with their fingerprints, and the arguments."""
    made_by = {m.kind: {"source": m.source, "fingerprint": m.fingerprint} for m in models}
    text = json.dumps({"made_by": made_by, "arguments": vars(args)}, indent=1)
    write_atomically(path, text.encode())


def labels_of(text: str, model: api.Model) -> list[int]:
    """Returns the labels that a text lists: numbers, and names that the model knows."""
    names = model.class_names
    if not names and files.is_dir(model.source):  # It was trained before runs kept the names.
        with contextlib.suppress(ConfigError):
            names = class_names(model.source)
    return parse_labels(text, names)


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = parse_arguments(argv)
    distributed.start(args.coordinator_address, args.num_processes, args.process_id)
    images = generate(args)
    if jax.process_index() == 0:
        print(f"{len(images)} images of {images.shape[1]}x{images.shape[2]} px in {args.out}")
    return 0
