"""Class names, in the order of the labels: those of images, and those a trained model has learned.

    detailflow classes runs/gen

They travel from the images to the manifest of codes or latents, and from there, or from the images
themselves, to the configuration of a run (`class_names` in WORKDIR/config.json).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from detailflow_jax.data.errors import printable
from detailflow_jax.data.folders import as_typed
from detailflow_jax.data.shard_source import manifest_names
from detailflow_jax.data.sources import SOURCE_KINDS, make_source
from detailflow_jax.runtime import files
from detailflow_jax.runtime.command import make_parser
from detailflow_jax.runtime.config import read_config
from detailflow_jax.runtime.errors import ConfigError, UserError, closest_names, reported
from detailflow_jax.runtime.yaml_text import parse_yaml

_NUMBERS = re.compile(r"[\d,\s-]+")
_MOST_LABELS = 1_000_000  # in a range; more are a slip of the pen


def class_names(place: str) -> tuple[str, ...]:
    """Returns the class names of a run, of codes or latents, or of images, in label order.

    Args:
        place: a workdir, a folder that `detailflow convert` wrote, of codes or latents, or of
            images, or a source of images such as "digits" or "tfds:cifar10".

    Raises:
        ConfigError: nothing of these, or a run that has no class names.
    """
    if place.partition(":")[0] in SOURCE_KINDS:
        return tuple(make_source(place).class_names)
    path = re.sub("^(codes|latents):", "", place)
    folder = files.path(path)
    if files.exists(folder / "config.json"):
        config = read_config(folder)
        if names := config.get("class_names") or _exported(folder / "config.yaml"):
            return tuple(names)
        source = str(config.get("data", {}).get("source", ""))
        if ":" in source or source in SOURCE_KINDS:  # Trained before runs kept the names.
            return class_names(source)
        raise ConfigError(f"{path} has no class names, and no data source to ask for them")
    if files.exists(manifest := folder / "manifest.json"):
        return manifest_names(files.read_json(manifest), manifest)
    return tuple(make_source(f"folder:{path}").class_names)


def _exported(path: files.PathLike) -> list[str]:
    """The class names that `detailflow convert --to pytorch` writes beside the weights."""
    if not files.exists(path):
        return []
    try:
        content = parse_yaml(files.read_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"cannot read {path}: {error}; expected YAML") from error
    names = content.get("class_names") if isinstance(content, dict) else None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else []


def parse_labels(text: str, names: Sequence[str] = ()) -> list[int]:
    """Returns the labels that a text lists: numbers and ranges of them, and class names.

    Args:
        text: such as "0-9", "3,1,4" or "dog,cat". A number is a label, also where it is the name
            of another class.
        names: of the classes, in label order; none where they are not known.

    Raises:
        ConfigError: a name that is not one of them; the text suggests the closest names.
    """
    known = {as_typed(name): label for label, name in reversed([*enumerate(names)])}
    labels, parts = [], text.split(",")
    most = 1 + max((name.count(",") for name in names), default=0)
    while parts:
        # The longest first: a name may have commas in it.
        starts = [",".join(parts[:count]).strip() for count in range(most, 0, -1)]
        name = next((x for x in starts if as_typed(x) in known and not _NUMBERS.fullmatch(x)), None)
        if name is not None:
            labels.append(known[as_typed(name)])
            del parts[: name.count(",") + 1]
            continue
        part = parts.pop(0).strip()
        if match := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < first + _MOST_LABELS:
                raise ConfigError(
                    f"cannot read labels {text!r}: {part} is no range of labels, expected the "
                    "first and the last one, as in 0-9"
                )
            labels.extend(range(first, last + 1))
            if known.get(as_typed(part), first) != first:
                logging.warning(
                    "%s is label %d, not the class named %r, which is label %d",
                    part, first, part, known[as_typed(part)],
                )  # fmt: skip
        elif names:
            raise ConfigError(
                f"cannot read labels {text!r}: there is no class {part!r} among {shown(names)}; "
                + closest_names(part, [*map(printable, names)])
            )
        else:
            raise ConfigError(
                f"cannot read labels {text!r}: expected numbers as in 0-9 or 3,1,4 (names such as "
                "dog,cat need a model that was trained here on data with class names)"
            )
    return labels


def check_same_classes(names: Sequence[str], workdir: str) -> None:
    """Raises ConfigError if a run was started with other class names, or another order of them."""
    if not files.exists(files.path(workdir) / "config.json"):
        return
    before = read_config(workdir).get("class_names", ())
    if before and names and tuple(before) != tuple(names):
        raise ConfigError(
            f"{workdir} was trained with the classes {shown(before)}; the data have "
            f"{shown(names)}: give the run another --workdir, or the data their order with a "
            "classes.txt beside the class folders"
        )


def warn_of_other_names(names: Sequence[str], start: Mapping[str, Any]) -> None:
    """Warns where training starts from as many classes as there are here, but of other names.

    Args:
      names: of the classes here.
      start: `config.init_from`.
    """
    model, _, _ = (start.get("model") or "").partition("#")
    if not model or start.get("classes") or not files.exists(files.path(model) / "config.json"):
        return
    before = read_config(model).get("class_names", ())
    if len(before) == len(names) and tuple(before) != tuple(names):
        by_name = ",".join(str(before.index(x)) if x in before else "new" for x in names)
        logging.warning(
            "the classes of %s are %s: their vectors are taken by label; by name they are taken "
            "with --config.init_from.classes=%s",
            model,
            shown(before),
            by_name,
        )


def shown(names: Sequence[str], most: int = 10) -> str:
    """Returns the first labels with their names, on one line."""
    rest = f", ... ({len(names)} classes)" if len(names) > most else ""
    return ", ".join(f"{i}: {printable(name)}" for i, name in enumerate(names[:most])) + rest


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = make_parser(
        "classes",
        description="List the classes: the label and the name of each, tab-separated.",
        epilog="Labels follow the names of the class folders, numbers in them by value, or the "
        "lines of classes.txt beside the folders.",
    )
    help_text = (
        "a workdir, a folder of codes, latents, images or `detailflow convert`, or a source such "
        "as digits"
    )
    parser.add_argument("place", metavar="DIR", help=help_text)
    names = class_names(parser.parse_args(argv).place)
    print("\n".join(f"{label}\t{printable(name)}" for label, name in enumerate(names)))
    return 0
