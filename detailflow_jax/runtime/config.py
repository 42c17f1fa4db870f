"""Configurations: one readable Python file, fields overridden by flags, written to the workdir.

A configuration is the `ml_collections.ConfigDict` that `get_config(arg)` of a file returns. On the
command line it is named as FILE.py or FILE.py:ARG, and `--config.NAME=VALUE` gives a field another
value of its own type. An unknown field, variant or option is an error that lists the closest names.

The files in `configs/` are part of the package. `configs/tokenizer.py` is looked for in the working
directory first, then in the clone or installed package. A configuration file elsewhere may import
the files beside it, and `config_parts` of `configs/`.
"""

import contextlib
import inspect
import json
import math
import os
import pathlib
import re
import runpy
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from detailflow_jax.runtime import files, upgrade
from detailflow_jax.runtime.errors import BucketError, ConfigError, raised_as, unknown_name

T = TypeVar("T")

# Fields that a resumed run may change: they do not change what it computes.
MAY_DIFFER = (
    "class_names",  # of the data; written by `write_config`, no field of config files
    "encoded_by",  # the same
    "fingerprints",  # the same, and of frozen weights
    "log_every",
    "figures_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "stall_seconds",
    "profile",
    "wandb",
    "score",
    "accumulate",
    "decode_buckets",
    "mesh",
    "data.prefetch",
    "data.num_workers",
    "data.num_threads",
    "data.worker_buffer",
)
# What a config.json holds under these names, if it has them.
_KINDS = {
    **dict.fromkeys(("task", "encoded_by"), (str, "text")),
    **dict.fromkeys(("data", "ema", "losses", "model"), (dict, "a section of fields")),
    "class_names": (list, "a list of texts"),
}
# Fields that name places: another one may hold the same, as its fingerprint tells.
MAY_MOVE = {
    **dict.fromkeys(("data.source", "data.data_dir"), "data"),
    **dict.fromkeys(("teacher.path", "discriminator.path", "vae.path"), "weights"),
    **dict.fromkeys(("losses.perceptual.path", "losses.perceptual.linear"), "weights"),
}


# --------------------------------------------------------------------------- files and overrides


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a configuration file and applies overrides, each checked against its field's type.

    Args:
        spec: "FILE.py" or "FILE.py:ARG"; ARG goes to the file's `get_config`. A file that is not in
            the working directory is looked for among those of the package, see `find_config_file`.
        overrides: "--config.optim.lr=1e-3", in order. Tuples as "(0.9, 0.95)"; a field whose
            default is None takes values if the file declares it as `placeholder(type)`.

    Returns:
        The configuration, locked: fields can be read and changed, not added.

    Raises:
        ConfigError: no such file, variant or field (the closest names are listed), or a value that
            is not of the field's type.
    """
    config = _run_config_file(spec)
    upgrade.check_names(config)
    config.lock()
    # Beside the fields, not among them; a copy of the configuration does not have them.
    object.__setattr__(config, "_defaults", flatten(_as_json(config)))
    given = {override.partition("=")[0].removeprefix("--config.") for override in overrides}
    object.__setattr__(config, "_given", given)
    for override in overrides:
        _apply_override(config, override)
    return config


def find_config_file(path: str) -> pathlib.Path:
    """Returns where a configuration file is: as given, or else in the package.

    Raises:
        ConfigError: it is in neither; the text lists the folders and the files that are there.
    """
    file = pathlib.Path(path)
    if file.is_file():
        return file
    places = [pathlib.Path.cwd()]
    if file.parts[:1] == ("configs",):  # Such a path only: the names of others mean nothing here.
        places.append(_SHIPPED)
        shipped = _SHIPPED.joinpath(*file.parts[1:])
        if shipped.is_file():
            return shipped
    known = sorted(f"configs/{x.name}" for x in _SHIPPED.glob("*.py") if x.stem != _PARTS)
    raise ConfigError(
        f"there is no config file {path!r}; looked in {' and '.join(map(str, places))}. The files "
        f"of the package are {', '.join(known)}. Name one as FILE.py:VARIANT, such as "
        "configs/tokenizer.py:digits"
    )


def _shipped_folder() -> pathlib.Path:
    package = pathlib.Path(__file__).resolve().parents[1]
    clone = package.parent / "configs"
    # Without the check, an unrelated `configs` beside an installed package would be taken.
    return clone if (clone / f"{_PARTS}.py").is_file() else package / "configs"


_PARTS = "config_parts"  # what configuration files share; none itself
_SHIPPED = _shipped_folder()


def _run_config_file(spec: str) -> ConfigDict:
    files.local_path(spec, "--config")
    path, has_arg, arg = spec.partition(":")
    file = find_config_file(path)
    with _imports_beside(file):
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise ConfigError(f"{path} defines no function get_config(arg)")
        if has_arg and not inspect.signature(get_config).parameters:
            raise ConfigError(f"{path} has no variants: write {path!r} instead of {spec!r}")
        try:
            config = get_config(arg) if has_arg else get_config()
        except ConfigError as error:  # What it has against its argument; others are bugs.
            raise ConfigError(f"{spec}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config


@contextlib.contextmanager
def _imports_beside(file: pathlib.Path) -> Iterator[None]:
    """Within, imports find the modules beside `file`, as for a script, and the shipped ones.

    These modules are forgotten at the end, so that two folders with modules of the same name, such
    as an edited copy of `configs/`, do not mix.
    """
    folder, shipped = str(file.resolve().parent), str(_SHIPPED)
    before = dict(sys.modules)
    set_aside = _modules_in({shipped} - {folder})
    for name in set_aside:
        del sys.modules[name]
    paths = list(dict.fromkeys([folder, shipped]))
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in _modules_in(paths):
            if sys.modules[name] is not before.get(name):
                del sys.modules[name]
        sys.modules.update(set_aside)


def _modules_in(folders: Iterable[str]) -> dict[str, types.ModuleType]:
    """The imported modules whose files lie directly in one of the folders."""
    folders = set(folders)
    return {
        name: module
        for name, module in sys.modules.copy().items()
        if name != "__main__"
        and os.path.dirname(getattr(module, "__dict__", {}).get("__file__") or "") in folders
    }


def _apply_override(config: ConfigDict, override: str, shown_as: str = "config.") -> None:
    flag, has_value, text = override.partition("=")
    name = flag.removeprefix("--config.")
    if name == flag or not has_value:
        raise ConfigError(f"cannot read {override!r}: write an override as --config.NAME=VALUE")
    fields = flatten(config)
    if name not in fields:
        if new := upgrade.new_name(config, name):
            raise ConfigError(f"config.{name} is now --config.{new}")
        if any(field.startswith(f"{name}.") for field in fields):
            raise ConfigError(f"config.{name} is a group of fields: override one field of it")
        raise unknown_name("config field", name, fields)
    private_flags = flags.FlagValues()
    try:
        # As `config_flags.DEFINE_config_file` does, but one override at a time, so that an error
        # names its field and errors of the file itself stay readable.
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=private_flags, sys_argv=["", override]
        )
        private_flags(["", override])
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{shown_as}{name}: {_expected(config, name)}, got {text!r}") from error


def _expected(config: ConfigDict, name: str) -> str:
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    kind, value = config.get_type(field), config[field]
    if kind in (type(None), list):
        return (
            f"the default {value!r} does not determine the type (in the file, write "
            "placeholder(float) for a number that may be None, a tuple for a list)"
        )
    return f"expected {kind.__name__} (the default is {value!r})"


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns every field under its full name: {"optim.lr": 1e-3, ...}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# ------------------------------------------------------------------------------- names and variants


def choose(name: str, options: Mapping[str, T], what: str) -> T:
    """Returns options[name].

    Args:
        name: the option wanted.
        options: all options by name.
        what: what the error calls an option, such as "generator size".

    Raises:
        ConfigError: unknown; the text lists the closest names.
    """
    if name not in options:
        raise unknown_name(what, name, options)
    return options[name]


def decode_variant(
    arg: str | None, variants: Iterable[str], **options: Any
) -> tuple[str, ConfigDict]:
    """Reads the argument of a config file, "VARIANT" or "VARIANT:OPTION,OPTION=VALUE".

    Args:
        arg: such as "detailflow_16:runlocal,batch_size=8".
        variants: the names of the variants.
        **options: the options with their defaults. A value is read as the type of its default;
            a bare option means True. Numbers are finite and at least 0.

    Returns:
        (variant, options as a ConfigDict with one entry for each of `options`).

    Raises:
        ConfigError: no variant, an unknown variant or option, or a value of another type.
    """
    variant, _, rest = (arg or "").partition(":")
    variants = dict.fromkeys(variants)
    if not variant:
        raise ConfigError(f"name a variant, FILE.py:VARIANT; expected one of {', '.join(variants)}")
    if variant not in variants and (hint := _second_colon(variant, variants, options)):
        raise ConfigError(hint)
    choose(variant, variants, "variant")
    values = ConfigDict(options)
    for item in filter(None, rest.split(",")):
        name, has_value, text = item.partition("=")
        choose(name, options, "option")
        if not has_value and not isinstance(options[name], bool):
            raise ConfigError(f"option {name} needs a value: {name}={options[name]!r}")
        _apply_override(values, f"--config.{name}={text if has_value else 'true'}", "option ")
        if not isinstance(values[name], str) and not 0 <= values[name] < math.inf:
            raise ConfigError(f"option {name}: expected a number of at least 0, got {text!r}")
    return variant, values


def _second_colon(variant: str, variants: Iterable[str], options: Mapping[str, Any]) -> str:
    """The error text for options that stand where a variant belongs; empty for other mistakes."""
    first, *rest = re.split("[,=]", variant, maxsplit=1)
    if first in variants and rest:
        return f"unknown variant {variant!r}: options follow a second colon, {first}:{rest[0]}"
    if first in options:
        known = ", ".join(variants)
        return f"{first!r} is an option: write it after a variant, VARIANT:{variant}, of {known}"
    return ""


def check_fields(config: ConfigDict, expected: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises ConfigError if a field of `expected` is missing or has another type."""
    fields = flatten(config)
    for name, kind in expected.items():
        if name not in fields:
            raise ConfigError(f"the configuration lacks config.{name}: add it to the config file")
        if type(fields[name]) is not kind:
            raise ConfigError(
                f"config.{name} is {fields[name]!r}: expected {kind.__name__}, "
                f"got {type(fields[name]).__name__}"
            )


# ---------------------------------------------------------------------------------- in the workdir


def write_config(
    config: ConfigDict,
    workdir: str | os.PathLike,
    class_names: Sequence[str] = (),
    encoded_by: str = "",
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Writes the resolved configuration to WORKDIR/config.json, atomically.

    Args:
        config: of the run.
        workdir: made if missing.
        class_names: of the labels, if known. This and the next two become fields of the file.
        encoded_by: fingerprint of the encoder that made the codes or latents.
        fingerprints: of the "data" and the frozen "weights". A later run compares these, so the
            files may move.

    Raises:
        ConfigError: the workdir cannot be made or written.
    """
    try:
        files.make_folder(workdir)
        of_data = {"class_names": list(class_names), "encoded_by": encoded_by}
        of_data |= {"fingerprints": {k: x for k, x in (fingerprints or {}).items() if x}}
        more = {name: value for name, value in of_data.items() if value}
        text = json.dumps(_as_json(config) | more, indent=2) + "\n"
        files.write_atomically(os.path.join(workdir, "config.json"), text.encode())
    except BucketError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot write to the workdir {workdir}: {error}") from error


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """Returns the configuration in WORKDIR/config.json, locked, with tuples for sequences.

    Raises:
        ConfigError: no such file, or not a configuration.
    """
    path = files.path(workdir) / "config.json"
    try:
        return from_json(files.read_json(path), path)
    except FileNotFoundError as error:
        raise ConfigError(f"{workdir} is not a workdir: it holds no config.json") from error


def from_json(fields: Mapping[str, Any], path: str | os.PathLike) -> ConfigDict:
    """Returns what a config.json holds, locked, with today's names and tuples for sequences.

    Raises:
        ConfigError: the fields at `path` are not those of a configuration.
    """
    for name, (kind, expected) in _KINDS.items():
        value = fields.get(name, kind())
        if not isinstance(value, kind) or (kind is list and any(type(x) is not str for x in value)):
            raise ConfigError(f"{path}: {name} is {value!r:.99}, expected {expected}")
    with raised_as(ConfigError, f"{path} is not a configuration: "):  # Such as a dot in a name.
        return ConfigDict(_with_tuples(upgrade.upgraded(dict(fields)))).lock()


def check_same(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Checks that a workdir was not started with another configuration.

    `total_steps` may grow. A field that the workdir's configuration does not have yet counts there
    with its default, the value in the config file. A field of `MAY_MOVE` is left to `check_moved`
    where the workdir has the fingerprint.

    Args:
        config: the configuration to run now.
        workdir: of the run; if it has no config.json there is nothing to compare.

    Raises:
        ConfigError: fields differ; the text lists them with old and new values, and what to do.
    """
    if not files.exists(os.path.join(workdir, "config.json")):
        return
    new = flatten(_as_json(config))
    defaults = getattr(config, "_defaults", new)
    written = flatten(_as_json(read_config(workdir)))
    old = {name: defaults[name] for name in new if name in defaults} | written
    absent = object()
    moved = [name for name, kind in MAY_MOVE.items() if f"fingerprints.{kind}" in written]
    differing = [
        name
        for name in dict.fromkeys([*written, *new])
        if old.get(name, absent) != new.get(name, absent)
        and not any(name == free or name.startswith(f"{free}.") for free in (*MAY_DIFFER, *moved))
    ]
    before, now = old.get("total_steps"), new.get("total_steps")
    if "total_steps" in differing and isinstance(before, int) and before < now:
        differing.remove("total_steps")
        logging.warning("total_steps grows from %d to %d, and schedules follow it", before, now)
    if differing:
        differences = [
            f"  {name}: {_shown(old, name)} in the workdir, {_shown(new, name)} now"
            for name in differing
        ]
        raise ConfigError(
            "\n".join([f"{workdir} was started with another configuration:", *differences])
            + "\nGive the run another --workdir (or delete this one), or resume it with its own "
            "configuration."
        )


def check_moved(
    config: ConfigDict, workdir: str | os.PathLike, kind: str, fingerprint: str
) -> None:
    """Checks that what a resumed run finds in another place is the same as before.

    Args:
        config: the configuration to run now.
        workdir: of the run; if it has no config.json there is nothing to compare.
        kind: "data" or "weights", of `MAY_MOVE`.
        fingerprint: of what is there now.

    Raises:
        ConfigError: it is not the same; the text names the places.
    """
    if not files.exists(os.path.join(workdir, "config.json")):
        return
    written, new = flatten(_as_json(read_config(workdir))), flatten(_as_json(config))
    before = written.get(f"fingerprints.{kind}")
    for name, of in MAY_MOVE.items():
        if of != kind or before is None or written.get(name) == new.get(name):
            continue
        if before != fingerprint:
            raise ConfigError(
                f"{workdir} was started with other {kind}: config.{name} is {_shown(written, name)}"
                f" there, {_shown(new, name)} now, and they differ. Name the same, or give the run "
                "another --workdir"
            )
        logging.info("config.%s has moved to %s and is the same", name, _shown(new, name))


def _shown(fields: dict[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "absent"


def _as_json(config: ConfigDict) -> dict:
    """Returns the fields as JSON reads them back: plain dictionaries, lists for tuples."""
    return json.loads(config.to_json())


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return value
