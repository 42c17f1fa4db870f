"""Scores of generated images and of reconstructions, by the conventions of published tables.

    detailflow evaluate generation --model runs/gen --decoder runs/tok \\
        --reference VIRTUAL_imagenet256_labeled.npz --cfg_scale 1.3,1.45,1.6 --out runs/scores
    detailflow evaluate generation --samples samples.npz --reference folder:photos
    detailflow evaluate generation --samples samples.npz --reference folder:photos \\
        --features pixels
    detailflow evaluate reconstruction --model runs/tok \\
        --reference tfds:imagenet2012:validation --num_tokens 16,64,128 --noise_groups 0,4
    detailflow evaluate reconstruction --model runs/tok --reference folder:photos \\
        --features pixels --without lpips

Run the same command again to resume.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax

from detailflow_jax.evaluate import chunks, features, generation, reconstruction, references
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.models import Reconstructor, Sampler
from detailflow_jax.evaluate.networks import (
    FEATURES,
    encoder_extractor,
    load_extractor,
    load_perceptual,
    pixel_extractor,
)
from detailflow_jax.evaluate.samples import open_samples
from detailflow_jax.inference import api, rules
from detailflow_jax.runtime import distributed, extras, files, platforms
from detailflow_jax.runtime.command import HelpFormatter, make_parser, number, seed, several, whole
from detailflow_jax.runtime.errors import reported

KINDS = {
    "detailflow": (
        api.load_generator,
        api.load_tokenizer,
        ("num_tokens", "temperature", "top_k", "top_p", "gradual_cfg"),
    ),
    "flowar": (api.load_flowar, api.load_vae, ("num_steps", "guidance_high")),
}
"""--kind -> how its generating model and its decoder are loaded, and what its `sample` takes."""


# --------------------------------------------------------------------------------- the command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        "evaluate",
        description="Score generated images or reconstructions. Run the same command again to "
        "resume.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, add_options in (
        (
            "generation",
            "FID, sFID, inception score, precision and recall of samples, or figures like them of "
            "features that need no download",
            _add_generation,
        ),
        (
            "reconstruction",
            "rFID, PSNR, SSIM and LPIPS of a tokenizer or VAE, or a distance like rFID of features "
            "that need no download",
            _add_reconstruction,
        ),
    ):
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=HelpFormatter, allow_abbrev=False
        )
        add = command.add_argument
        add("--out", default=f"runs/evaluate/{name}", help="folder for results, also partial ones")
        add("--inception", help="Inception of FID; default as `detailflow weights` lists it")
        add("--data_dir", help="where TFDS keeps its data")
        add("--weights", choices=("model", "ema"), help="which weights of a checkpoint")
        add(
            "--batch_size",
            type=whole(1),
            default=64,
            help="images per call, on this process's devices",
        )
        distributed.add_arguments(command)
        add_options(command)
    return parser.parse_args(argv)


def _add_generation(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--samples", help="score this .npz (arr_0) or folder of pictures; no model is needed")
    add("--model", help="generating model: a workdir or a published checkpoint")
    add("--decoder", help="what makes images of its samples: the tokenizer, or VAE")
    add("--kind", default="detailflow", choices=sorted(KINDS), help="of the model")
    add("--reference", required=True, help=".npz, folder of pictures, tfds:NAME:SPLIT, digits:test")
    add(
        "--features",
        default="inception",
        choices=FEATURES,
        help="what images are compared by: inception gives FID; encoder, of the tokenizer or VAE "
        "at --decoder, and pixels, after a principal component analysis, need no download and give "
        "figures with names of their own",
    )
    add("--cache", default=references.CACHE, help="where statistics of references are kept")
    add(
        "--cfg_scale",
        default="1.5",
        type=several(number(1)),
        help="guidance scales, such as 1.3,1.45: the best FID is picked",
    )
    add("--num_samples", type=whole(1), help="default 50000, of --samples all")
    add("--labels", default="balanced", choices=generation.LABELS, help="classes of the samples")
    add(
        "--seeds",
        type=whole(1),
        default=1,
        help="number of seeds, from 0; means and deviations follow",
    )
    add("--npz", action="store_true", help="keep the images of each setting as an .npz")
    add = command.add_argument_group("of --kind flowar").add_argument
    add("--num_steps", type=whole(1), default=25, help="flow steps per scale")
    add(
        "--guidance_high",
        type=number(0, 1),
        default=0.9,
        help="guidance from this time on; 1 is noise",
    )
    add = command.add_argument_group("of --kind detailflow").add_argument
    add("--num_tokens", type=whole(1), help="tokens to sample; default all")
    add("--gradual_cfg", action="store_true", help="lower the guidance group by group")
    rules.add_arguments(add)


def _add_reconstruction(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help="tokenizer or VAE: a workdir or a published checkpoint")
    add("--kind", default="tokenizer", choices=("tokenizer", "vae"), help="of the model")
    add("--reference", required=True, help="images: .npz, folder, tfds:NAME:SPLIT, digits:test")
    add(
        "--image_size",
        type=whole(1),
        help="side of the images; default the tokenizer's, of a VAE 256",
    )
    add("--num_images", type=whole(1), help="use only the first N; default all")
    add(
        "--num_tokens",
        type=several(whole(1)),
        help="token counts, such as 16,64,128; default all tokens",
    )
    add(
        "--noise_groups",
        type=several(whole(0)),
        help="groups to perturb, such as 0,4: the self-correction test",
    )
    add("--noise_top", type=whole(1), default=50, help="noise picks from this many closest codes")
    add("--seed", type=seed, default=0, help="of the noise")
    lpips = "LPIPS in one file, or VGG16 and vgg.pth; default as for --inception"
    add("--lpips", nargs="+", metavar="FILE", help=lpips)
    add(
        "--features",
        default="inception",
        choices=FEATURES,
        help="what reconstructions and originals are compared by: inception gives rFID; encoder, "
        "of the model itself, and pixels, after a principal component analysis, need no download "
        "and give a figure with a name of its own",
    )
    without = "metrics to leave out; rfid is the distance of --features, whichever they are"
    add("--without", nargs="+", default=[], choices=("rfid", "lpips"), help=without)


# ------------------------------------------------------------------------------------- the commands


def run_generation(args: argparse.Namespace) -> dict[str, Any]:
    """Scores samples of a model, or a set of images; returns what results.json holds."""
    out = files.path(args.out)
    if bool(args.samples) == bool(args.model):
        raise EvaluationError("give either --samples, or --model with --decoder")
    if args.model and not args.decoder:
        raise EvaluationError("--model needs --decoder, the tokenizer or VAE that makes images")
    if args.features == "encoder" and not args.decoder:
        raise EvaluationError("--features encoder needs --decoder, the tokenizer or VAE it is of")
    if len(args.cfg_scale) > 1:
        extras.require("matplotlib.figure")  # Draws the curve after hours of sampling.
    decoder = None
    if args.model or args.features == "encoder":
        decoder = KINDS[args.kind][1](args.decoder)
    if args.samples:
        images = open_samples(args.samples)
        height, width = images.shape[:2]
        if height != width:
            raise EvaluationError(
                f"{images.name} holds {width}x{height} px images: expected squares"
            )
        extractor, reference = load_features(args, height, decoder)
        row = generation.evaluate_images(images, reference, extractor, out, args.num_samples)
        results = {"unreadable": chunks.unreadable_in(out / "samples"), "rows": [row]}
    else:
        sampler = load_sampler(args, decoder)
        sweep = generation.Sweep(
            num_samples=50_000 if args.num_samples is None else args.num_samples,
            cfg_scales=args.cfg_scale,
            labels=args.labels,
            seeds=args.seeds,
            keep_images=args.npz,
        )
        extractor, reference = load_features(args, sampler.image_size, decoder)
        rows = generation.evaluate_sweep(sampler, sweep, reference, extractor, out)
        results = {"rows": rows, "summary": generation.summarize(rows)}
    about = {"name": reference.name, "fingerprint": reference.fingerprint}
    about["unreadable"] = list(reference.unreadable)
    return {"reference": about, "network": extractor.fingerprint, **results}


def load_features(
    args: argparse.Namespace, image_size: int, decoder: Any
) -> tuple[features.FeatureExtractor, references.Reference]:
    """The feature extractor that the arguments name, and the reference's features."""
    if args.features == "encoder":
        extractor = encoder_extractor(decoder, args.batch_size)
    elif args.features == "pixels":
        images = references.open_images(args.reference, image_size, args.data_dir)
        extractor = pixel_extractor(images, args.batch_size)
    else:
        extractor = load_extractor(args.inception, args.batch_size)
    reference = references.load_reference(
        args.reference, extractor, image_size=image_size, cache=args.cache, data_dir=args.data_dir
    )
    return extractor, reference


def load_sampler(args: argparse.Namespace, decoder: Any) -> Sampler:
    """The model that the arguments name, with its decoder."""
    load_model, _, names = KINDS[args.kind]
    model = load_model(args.model, weights=args.weights)
    api.check_pair(decoder, model)
    options = {name: getattr(args, name) for name in names}
    return Sampler(model, decoder, features.local_mesh(), args.batch_size, options)


def run_reconstruction(args: argparse.Namespace) -> dict[str, Any]:
    """Scores reconstructions; returns what results.json holds."""
    perceptual = None if "lpips" in args.without else load_perceptual(args.lpips)
    wanted, extractor = "rfid" not in args.without, None
    if wanted and args.features == "inception":  # Before the model, since its file may be missing.
        extractor = load_extractor(args.inception, args.batch_size)
    load = {"tokenizer": api.load_tokenizer, "vae": api.load_vae}[args.kind]
    model = load(args.model, weights=args.weights)
    mesh, noise = features.local_mesh(), (args.seed, args.noise_top)
    reconstructor = Reconstructor(model, mesh, args.batch_size, *noise, args.image_size)
    images = references.open_images(args.reference, reconstructor.image_size, args.data_dir)
    if wanted and args.features == "encoder":
        extractor = encoder_extractor(model, args.batch_size)
    elif wanted and args.features == "pixels":
        extractor = pixel_extractor(images, args.batch_size)
    rows = reconstruction.evaluate(
        reconstructor,
        images,
        files.path(args.out),
        counts=args.num_tokens or (),
        groups=args.noise_groups or (),
        num_images=args.num_images,
        extractor=extractor,
        perceptual=perceptual,
    )
    about = {"name": images.name, "fingerprint": images.fingerprint}
    about["unreadable"] = chunks.unreadable_in(files.path(args.out) / "reconstruction")
    return {"reference": about, "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text, one column per field."""

    def shown(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    columns = [[name, *(shown(row[name]) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    )


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or an error's exit code after one line on it."""
    args = parse_arguments(argv)
    distributed.start(args.coordinator_address, args.num_processes, args.process_id)
    if jax.process_index() == 0:
        files.make_folder(args.out)
    run = {"generation": run_generation, "reconstruction": run_reconstruction}[args.command]
    results = run(args)
    if jax.process_index() == 0:
        generation.write_results(files.path(args.out), results)
        print(table(results["rows"]))
        if len(results.get("summary", {}).get("by_cfg_scale", ())) > 1:
            print("\n" + table(results["summary"]["by_cfg_scale"]))
            summary = results["summary"]
            name = "FID" if summary["distance"] == "fid" else summary["distance"]
            print(f"\nlowest {name} at guidance {summary['best_cfg_scale']:g}")
        skipped = [*results["reference"]["unreadable"], *results.get("unreadable", ())]
        print(f"\n{args.out}/results.json; {len(skipped)} unreadable")
    return 0


if __name__ == "__main__":
    platforms.choose(tell=True)
    distributed.leave(main())
