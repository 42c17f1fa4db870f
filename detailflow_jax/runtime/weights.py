"""Published weights: what each recipe needs, where it is expected, and where people get it.

    detailflow weights                      # every file: there or not, its checksum
    detailflow weights tokenizer evaluate   # what these recipes need

Nothing is downloaded. Files are expected in $DETAILFLOW_WEIGHTS, default
~/.cache/detailflow_jax/weights, under the names below. The field or option that the list gives
names a file elsewhere. The registry of networks and the loss terms read the same list.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence

from tqdm import tqdm

from detailflow_jax.runtime import files
from detailflow_jax.runtime.command import make_parser
from detailflow_jax.runtime.errors import UserError

VARIABLE, DEFAULT_FOLDER = "DETAILFLOW_WEIGHTS", "~/.cache/detailflow_jax/weights"
COMMAND = "detailflow weights"
_BLOCK = 1 << 22


class WeightsError(UserError, ValueError):
    """Weights that are not there; the text says where they belong and what to do without them."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """One published file.

    Attributes:
      file: its name under the folder of weights.
      about: what it is.
      source: where people get it.
      checksum: how its SHA-256 begins, where its publisher says so (in the file's name).
    """

    file: str
    about: str
    source: str
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class Need:
    """What a recipe wants of one file.

    Attributes:
      weights: its key in `WEIGHTS`.
      use: what for.
      field: the field or option that names it elsewhere.
      without: how to do without it.
      automatic: found in its usual place; else the field has to be given.
    """

    weights: str
    use: str
    field: str
    without: str
    automatic: bool = True


WEIGHTS = {
    "siglip2": Weights(
        "siglip2-so400m-patch16-naflex/model.safetensors",
        "SigLIP2-so400m, the vision tower",
        "https://huggingface.co/google/siglip2-so400m-patch16-naflex (or name it as "
        "hf:google/siglip2-so400m-patch16-naflex, which downloads it)",
    ),
    "vgg16": Weights(
        "vgg16-397923af.pth",
        "VGG16 of torchvision, under LPIPS",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
    ),
    "lpips": Weights(
        "vgg.pth",
        "LPIPS's weights over VGG16's features",
        "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth",
    ),
    "dino": Weights(
        "dino_deitsmall16_pretrain.pth",
        "DINO ViT-S/16, under the discriminator's heads",
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
        "dino_deitsmall16_pretrain.pth",
    ),
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "the Inception network of FID, as torch-fidelity publishes it",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    "kl16": Weights(
        "kl16.ckpt",
        "the KL-16 autoencoder of MAR, 16 latent channels",
        "https://github.com/LTH14/mar, whose README links it",
    ),
}

TEACHER = Need(
    "siglip2",
    "alignment teacher",
    "config.teacher.path",
    "config.losses.align.weight=0",
    automatic=False,
)
_VGG_OFF = "config.losses.perceptual.weight=0"
VGG16 = Need("vgg16", "perceptual loss", "config.losses.perceptual.path", _VGG_OFF)
LPIPS = Need("lpips", "perceptual loss", "config.losses.perceptual.linear", _VGG_OFF)
DINO = Need(
    "dino",
    "discriminator",
    "config.discriminator.path",
    "config.losses.adversarial.weight=0, or config.discriminator.kind=patchgan",
)
RECIPES = {
    "tokenizer": (
        Need(
            "siglip2",
            "start of the encoder",
            "config.init_from.encoder",
            "leave config.init_from.encoder unset: the encoder starts from scratch",
            automatic=False,
        ),
        TEACHER,
        VGG16,
        LPIPS,
        DINO,
    ),
    "generator": (),
    "vae": (VGG16, LPIPS),
    "flowar": (
        Need(
            "kl16",
            "latents of images",
            "config.vae.path",
            "train one with configs/vae.py, or use latents extracted before (latents:DIR)",
            automatic=False,
        ),
    ),
    "evaluate": (
        Need("inception", "FID and the scores beside it", "--inception", "--features pixels"),
        Need("vgg16", "LPIPS", "--lpips", "--without lpips"),
        Need("lpips", "LPIPS", "--lpips", "--without lpips"),
    ),
}
"""Recipe -> the weights that it needs."""


def fields_of(names: Sequence[str]) -> list[str]:
    """The fields and options that name the weights `names`, keys of `WEIGHTS`."""
    needs = (need for needs in RECIPES.values() for need in needs if need.weights in names)
    return list(dict.fromkeys(need.field for need in needs))


def folder() -> pathlib.Path:
    """Where published weights are expected."""
    return files.local_path(os.environ.get(VARIABLE) or DEFAULT_FOLDER, VARIABLE)


def expected(name: str) -> pathlib.Path:
    """The usual place of the weights `name`, a key of `WEIGHTS`, whether they are there or not."""
    return folder() / WEIGHTS[name].file


def locate(
    name: str, *, field: str, without: str, path: str | os.PathLike | None = None
) -> pathlib.Path:
    """The file with the weights `name`.

    Args:
      name: a key of `WEIGHTS`.
      field: what the user sets to name another place, for the message.
      without: what the user sets to do without, for the message.
      path: another place than the usual one; None or "" is the usual one.

    Raises:
      WeightsError: it is not.
    """
    file = files.local_path(path, field) if path else expected(name)
    if file.is_file():
        return file
    weights = WEIGHTS[name]
    raise WeightsError(
        f"{weights.about}: not at {file}. Get {pathlib.Path(weights.file).name} from "
        f"{weights.source} and put it there, or name it with {field}. To do without it: {without}. "
        f"`{COMMAND}` lists what every recipe needs"
    )


def sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, 64 hexadecimal digits; a bar shows the progress of a large one."""
    digest, size = hashlib.sha256(), os.path.getsize(path)
    options = {"unit": "B", "unit_scale": True, "leave": False, "disable": size < 100 * _BLOCK}
    with open(path, "rb") as file, tqdm(total=size, desc=os.path.basename(path), **options) as bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def wanted_by(recipes: Sequence[str]) -> dict[str, list[tuple[str, Need]]]:
    """Key of `WEIGHTS` -> [(recipe, need)], for what these recipes need, each file once."""
    wanted: dict[str, list[tuple[str, Need]]] = {}
    for recipe in recipes:
        for need in RECIPES[recipe]:
            wanted.setdefault(need.weights, []).append((recipe, need))
    return wanted


# --------------------------------------------------------------------------------- the command line


def describe(
    name: str, needs: Sequence[tuple[str, Need]], *, checksum: bool = True
) -> tuple[str, bool]:
    """A paragraph about one file and what (recipe, need) wants it, and whether the file is good.

    Good is a file in its usual place, with the checksum that its publisher gives, if any.
    """
    weights, path, good = WEIGHTS[name], expected(name), True
    lines = [f"{name}: {weights.about}"]
    if path.is_file():
        lines.append(f"  there      {path} ({path.stat().st_size / 2**20:,.1f} MiB)")
        if checksum:
            found = sha256(path)
            good = found.startswith(weights.checksum)
            lines.append(f"  sha256     {found} {_judged(good, weights.checksum)}")
    else:
        good = False
        lines += [f"  MISSING    {path}", f"  get it     {weights.source}"]
    for recipe, need in needs:
        how = f"found there, or {need.field}" if need.automatic else f"give {need.field}={path}"
        lines.append(f"  {recipe:<10} {need.use}: {how}")
        lines.append(f"  {'without':<10} {need.without}")
    return "\n".join(lines), good


def _judged(good: bool, begins: str) -> str:
    if not begins:
        return "(its publisher gives none to compare with)"
    if good:
        return f"(begins with {begins}, as published)"
    return f"DAMAGED OR ANOTHER FILE: expected to begin with {begins}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the list; returns 0 if all that the recipes need is in its usual place, else 1."""
    parser = make_parser(
        "weights",
        description="List the published weights that recipes need, whether they are there, and "
        f"where people get them. Their folder is ${VARIABLE}, default {DEFAULT_FOLDER}.",
        epilog="exit codes: 0 all there; 1 some missing or damaged; 2 no such recipe",
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help=f"one or more of {', '.join(RECIPES)}; default all",
    )
    parser.add_argument(
        "--no_checksum", action="store_true", help="do not read the files to the end"
    )
    args = parser.parse_args(argv)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"unknown recipe {unknown[0]!r}: expected {', '.join(RECIPES)}")
    recipes = args.recipes or list(RECIPES)
    checksum = not args.no_checksum
    wanted = wanted_by(recipes)
    print(f"published weights in {folder()}\n")
    bad = []
    for name, needs in wanted.items():
        text, good = describe(name, needs, checksum=checksum)
        print(text, end="\n\n")
        bad += [] if good else [name]
    if idle := [recipe for recipe in recipes if not RECIPES[recipe]]:
        print(f"no weights needed: {', '.join(idle)}\n")
    print(f"missing or damaged: {', '.join(bad)}" if bad else "everything is there")
    return 1 if bad else 0
