"""Converts checkpoints between the published PyTorch layouts and this project's.

detailflow convert --to jax --src hf:ByteFlow-AI/DetailFlow-16 --dst models/tok16
detailflow convert --to pytorch --src runs/gen --dst exported/gen
detailflow convert --to diffusers --src runs/vae --dst exported/vae
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import re
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from detailflow_jax.convert import diffusers, export, portable
from detailflow_jax.convert.load import load
from detailflow_jax.convert.published import Loaded
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.writers import check_free, folder_for, local_path
from detailflow_jax.runtime import checkpoint
from detailflow_jax.runtime.command import make_parser, number, whole
from detailflow_jax.runtime.errors import reported

# What `write_jax` makes, and nothing of a run.
_FOLDER = {pathlib.Path("config.json"), pathlib.Path("checkpoints/0"), pathlib.Path("checkpoints")}


def overrides() -> dict[str, tuple[Any, str]]:
    """Name of an override -> (text -> value, help), of every network in the registry."""
    kinds: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for network in NETWORKS.values():
        for name, (kind, text) in network.options.items():
            kinds.setdefault(name, kind)
            texts.setdefault(name, [text]).append(network.name)
    return {n: (kinds[n], f"{t[0]} ({', '.join(t[1:])})") for n, t in texts.items()}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        "convert",
        description="Convert a checkpoint: a published one into a folder that df.load_* reads, or "
        "a model of this project into the published layout, or an autoencoder into a folder of "
        "diffusers. Reading never runs code from a file.",
        epilog="""\
examples:
  --to jax     --src hf:ByteFlow-AI/DetailFlow-16        --dst models/tokenizer16
  --to jax     --src downloads/gpt_l.pt --num_tokens 128 --dst models/generator16
  --to pytorch --src runs/tok                            --dst exported/tok
  --to pytorch --src runs/gen                            --dst exported/gen.safetensors
  --to jax     --src downloads/kl16.ckpt                 --dst models/kl16
  --to jax     --src downloads/FlowAR-L.pth              --dst models/flowar-l
  --to diffusers --src runs/vae                          --dst exported/vae

exit codes: 0 done; 2 not done, the last line says why and nothing partial is left.""",
    )
    add = parser.add_argument
    add("--to", required=True, choices=("jax", "pytorch", "diffusers"), help="the layout to write")
    add(
        "--src",
        required=True,
        metavar="PATH",
        help="a workdir, a published folder or file (.pt .pth .ckpt .bin .safetensors), gs://..., "
        "or hf:OWNER/NAME[@REVISION][/FILE]",
    )
    add(
        "--dst",
        required=True,
        metavar="PATH",
        help="a folder to make; for pytorch also a file ending in .pt .pth .ckpt .bin .safetensors",
    )
    add(
        "--weights",
        choices=("model", "ema"),
        help="which set to take; default of a published generator or FlowAR ema, of others model, "
        "of a run the average where it keeps one",
    )
    add("--allow_missing", action="store_true", help="initialise parameters that the file lacks")
    add("--allow_unused", action="store_true", help="leave out tensors that belong to no parameter")
    add("--bare", action="store_true", help="to pytorch: a state dict under no key")
    add(
        "--keys",
        type=lambda text: text.split(","),
        default=[],
        metavar="KEY,KEY",
        help=f"to pytorch: write these besides model: {', '.join(export.KEYS)}",
    )
    add("--overwrite", action="store_true", help="replace a checkpoint at --dst")
    group = parser.add_argument_group(
        "overrides", "what shapes cannot tell; default: the configuration beside the weights"
    )
    for name, (kind, text) in overrides().items():
        group.add_argument(
            f"--{name}",
            type={int: whole(), float: number()}.get(kind, kind),
            metavar={int: "N", float: "X"}.get(kind, "N,N"),
            help=text,
        )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> list[str]:
    """Converts as the arguments say; returns the lines of the report.

    Raises:
      UserError: see `load`, `export` and `write_jax`; nothing partial is left.
    """
    started = time.perf_counter()
    # What would only fail after minutes of reading fails now.
    check_free(local_path(args.dst), args.overwrite)
    told = {name: getattr(args, name) for name in overrides()}
    found = load(
        None,
        args.src,
        weights=args.weights,
        allow_missing=args.allow_missing,
        allow_unused=args.allow_unused,
        progress=functools.partial(tqdm, desc="read", unit="tensor"),
        overrides={name: value for name, value in told.items() if value is not None},
    )
    _tell(found.notices)
    report, size = found.report, sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))
    count = len(report.loaded) or len(jax.tree.leaves(found.params))
    lines = {
        "read": found.source,
        "network": f"{found.kind}, {size / 4e6:.1f}M parameters",
        "weights": "their average (ema)" if found.taken == "ema" else found.taken,
        "loaded": f"{count} tensors, {' and '.join(found.dtypes)} -> float32",
        "skipped (design)": _summary(report.skipped),
        "missing (new)": _summary(report.missing),
        "unused": _summary(report.unused),
    }
    if args.to == "jax":
        write_jax(found, args.dst, overwrite=args.overwrite)
        lines["written"] = args.dst
    elif args.to == "diffusers":
        written = diffusers.write(
            found.kind, found.config, found.params, args.dst, overwrite=args.overwrite
        )
        lines["written"] = str(written)
    else:
        done = export.export(
            found.kind,
            found.config,
            found.params,
            args.dst,
            bare=args.bare,
            keys=args.keys,
            source=found.source,
            encoded_by=found.encoded_by,
            class_names=found.class_names,
            overwrite=args.overwrite,
            progress=functools.partial(tqdm, desc="write", unit="tensor"),
        )
        _tell(f"{done.path}: {notice}" for notice in done.notices)
        lines["written"] = str(done.path)
        lines["tensors"] = f"{len(done.written)}, buffers {_summary(done.buffers)}"
        lines["left out (design)"] = _summary(done.left_out)
    peak = _peak_bytes()
    lines["memory"] = f"{peak / 2**30:.2f} GiB at most, {peak / size:.1f}x the weights"
    lines["time"] = f"{time.perf_counter() - started:.1f} s"
    return [f"{title:18}{text}" for title, text in lines.items()]


def write_jax(found: Loaded, dst: str, *, overwrite: bool = False) -> None:
    """Writes a folder that `df.load_*` reads as it reads a run: config.json and one checkpoint.

    Raises:
      CheckpointError: something is at `dst` that may not be replaced.
    """
    model = dataclasses.asdict(found.config)
    written = {"task": found.kind, "source": found.source, "model": model}
    written |= portable.known(encoded_by=found.encoded_by, class_names=found.class_names)
    with folder_for(local_path(dst), _FOLDER, overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        checkpoint.save_params(folder, found.params)


def _tell(notices: Iterable[str]) -> None:
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def _summary(names: Sequence[str]) -> str:
    """Names with their numbers, grouped by what comes before the first dot."""
    if len(names) <= 3:
        return ", ".join(names) or "none"
    groups = collections.Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{head}.* ({count})" for head, count in groups.items())


def _peak_bytes() -> int:
    """The most memory that this process has had resident, mapped files included."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):  # Not Linux, where `getrusage` counts the parent's peak as well.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    print("\n".join(convert(parse_arguments(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
