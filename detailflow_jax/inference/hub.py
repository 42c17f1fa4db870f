"""Models to the Hugging Face hub, with a card: configuration, figures and a picture.

    detailflow push runs/tok owner/name --results runs/eval/results.json

A repository holds README.md, config.json and model.safetensors, which `df.load("hf:owner/name")`
reads; on request also the published PyTorch layout, under `pytorch/` (an autoencoder of diffusers:
`diffusers/`), which `df.load_*("hf:owner/name/pytorch")` and the published code read.
"""

import argparse
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from detailflow_jax.convert import diffusers, export, portable
from detailflow_jax.convert.load import is_workdir
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.models.dc_ae import DCAEConfig
from detailflow_jax.runtime import files
from detailflow_jax.runtime.command import make_parser, whole
from detailflow_jax.runtime.errors import ConfigError, UserError, reported

if TYPE_CHECKING:
    from detailflow_jax.inference.models import Model

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_USE = {
    "tokenizer": "images = model.decode(model.encode(images))  # [B, H, W, 3], uint8 or in [-1, 1]",
    "generator": "codes = model.sample([3, 1, 4], seed=0)  # for the tokenizer it belongs to",
    "vae": "images = model.decode(model.encode(images))  # [B, H, W, 3], uint8 or in [-1, 1]",
    "flowar": "latents = model.sample([3, 1, 4], seed=0)  # for the autoencoder it belongs to",
}


class HubError(UserError, RuntimeError):
    """The hub did not take what was sent; the same command may succeed later."""

    exit_code = 1
    label = "failed"


def push(
    model: "Model",
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "",
    **about: Any,
) -> str:
    """Uploads a model in one commit; see `Model.push_to_hub`. `about` goes to `write`."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    _check_name(repo)
    with tempfile.TemporaryDirectory(prefix="detailflow-") as scratch:
        folder = Path(scratch) / "model"
        write(model, folder, repo, **about)
        try:
            api = hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            # One commit: a model is there whole or not at all.
            written = sorted(path for path in folder.rglob("*") if path.is_file())
            done = api.create_commit(
                repo,
                [
                    hub.CommitOperationAdd(path.relative_to(folder).as_posix(), path)
                    for path in written
                ],
                revision=revision,
                commit_message=message or f"{type(model).__name__} of detailflow_jax",
            )
        except (OSError, errors.HTTPError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise HubError(
                f"hf:{repo}: the hub did not take the model ({reason}). Log in with `hf auth "
                "login` or set HF_TOKEN to a token that may write there, and check the network"
            ) from error
    return str(done.commit_url)


def write(
    model: "Model",
    folder: Path,
    repo: str,
    *,
    workdir: str | os.PathLike[str] | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    picture: str | os.PathLike[str] | None = None,
    licence: str | None = None,
    pytorch: bool = False,
) -> None:
    """Writes what `push` uploads into a new folder.

    Raises:
      ConfigError: the folder, a file of results or the picture cannot be used.
    """
    workdir = model.source if workdir is None and is_workdir(model.source) else workdir
    tables = [_rows(path) for path in results] + _scores(workdir)
    image = _picture(workdir, picture)
    if folder.exists():
        raise ConfigError(f"{folder} exists already: name a new folder")
    folder.mkdir(parents=True)
    made_of = model.encoded_by, model.class_names
    portable.write(folder, model.kind, model.config, model.params, *made_of)
    if image:
        (folder / "picture.png").write_bytes(image)
    published = folder / "pytorch"
    if pytorch and isinstance(model.config, DCAEConfig):
        diffusers.write(model.kind, model.config, model.params, folder / "diffusers")
    elif pytorch:
        export.export(
            model.kind,
            model.config,
            model.params,
            published,
            source=model.source,
            encoded_by=model.encoded_by,
            class_names=model.class_names,
        )
    card = _card(model, repo, tables, bool(image), licence)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _check_name(repo: str) -> None:
    if not _NAME.fullmatch(repo.removeprefix("hf:")) or repo.startswith("hf:"):
        raise ConfigError(f"{repo!r} is no name of a repository; expected OWNER/NAME")


def _card(
    model: "Model", repo: str, tables: Sequence[str], image: bool, licence: str | None
) -> str:
    """The README.md of a repository."""
    system = "detailflow" if model.kind in ("tokenizer", "generator") else "flowar"
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params)) / 1e6
    head = ["library_name: detailflow_jax"]
    head += [f"license: {licence}"] if licence else []
    head += ["tags:", *(f"- {tag}" for tag in ("jax", "flax", system, model.kind))]
    fields = json.dumps(dataclasses.asdict(model.config), indent=2)
    belongs = f"\nIt belongs to the encoder `{model.encoded_by}`.\n" if model.encoded_by else ""
    parts = [
        "---\n" + "\n".join(head) + "\n---\n",
        f"# {repo.partition('/')[2]}\n",
        f"A {NETWORKS[model.kind].title} of `detailflow_jax`, {count:.1f}M parameters.\n{belongs}",
        "![What it makes](picture.png)\n" if image else "",
        "```python\nimport detailflow_jax as df\n\n"
        f'model = df.load("hf:{repo}")\n{_USE[model.kind]}\n```\n',
        *(["## Figures\n", *tables] if tables else []),
        f"## Configuration\n\n```json\n{fields}\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def _rows(path: str | os.PathLike[str]) -> str:
    """A results.json of `detailflow evaluate` as a table."""
    found = files.read_json(files.path(path))
    rows, reference = found.get("rows"), found.get("reference") or {}
    is_table = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not is_table or not isinstance(reference, dict):
        raise ConfigError(f"{path}: expected a results.json that `detailflow evaluate` wrote")
    names = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
    lines = [[_shown(row.get(name)) for name in names] for row in rows]
    against = f"Against {reference['name']}:\n\n" if reference.get("name") else ""
    return against + _table(names, lines)


def _scores(workdir: str | os.PathLike[str] | None) -> list[str]:
    """The last scores of a run, if it has any."""
    path = files.path(workdir) / "metrics.jsonl" if workdir else None
    if path is None or not path.exists():
        return []
    lines = files.read_json_lines(path)
    scored = [line for line in lines if any(name.startswith("score/") for name in line)]
    if not scored:
        return []
    last = {k.removeprefix("score/"): v for k, v in scored[-1].items() if k.startswith("score/")}
    rows = [[name, _shown(value)] for name, value in last.items()]
    return [
        f"During training, at step {scored[-1].get('step')}:\n\n" + _table(["score", "value"], rows)
    ]


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [names, ["-"] * len(names), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)


def _picture(
    workdir: str | os.PathLike[str] | None, picture: str | os.PathLike[str] | None
) -> bytes | None:
    """The picture named, else the newest one of the run."""
    if picture is not None:
        try:
            content = files.read_bytes(files.path(picture))
        except OSError as error:
            raise ConfigError(f"{picture}: cannot be read: {error}") from error
        if not content.startswith(b"\x89PNG"):
            raise ConfigError(f"{picture}: expected a PNG")
        return content
    folder = files.path(workdir) / "figures" if workdir else None
    if folder is None or not folder.is_dir():
        return None
    # NAME_STEP.png; of one step what comes first by name.
    found = {path.name: path for path in folder.iterdir() if path.name.endswith(".png")}
    step = lambda name: (-int(name[:-4].rpartition("_")[2]), name)  # noqa: E731
    named = sorted((name for name in found if name[:-4].rpartition("_")[2].isdecimal()), key=step)
    return files.read_bytes(found[named[0]]) if named else None


# ------------------------------------------------------------------------------------ the command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        "push",
        description="Upload a model to the Hugging Face hub with a card: its configuration, its "
        'figures and a picture. `df.load("hf:OWNER/NAME")` then loads it.',
        epilog="""\
examples:
  runs/tok owner/tokenizer16
  runs/gen owner/generator16 --results runs/eval/results.json --license apache-2.0 --pytorch
  runs/vae owner/vae --folder look-first

The token is that of `hf auth login`, or HF_TOKEN. Another hub: HF_ENDPOINT.
exit codes: 0 done; 1 the hub did not take it, try again; 2 not done, the last line says why.""",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="what df.load takes: a workdir, a published file or folder")
    add("repo", metavar="OWNER/NAME", help="the repository, made if it is not there")
    add(
        "--weights", choices=("model", "ema"), help="which set; default the average if there is one"
    )
    add("--step", type=whole(0), help="which checkpoint of a run; default the newest")
    add("--results", nargs="+", default=[], metavar="FILE", help="results.json of evaluations")
    add("--picture", metavar="FILE", help="a PNG for the card; default the run's newest one")
    add("--license", metavar="NAME", help="for the card, such as apache-2.0; default none is named")
    add("--pytorch", action="store_true", help="also the published PyTorch layout, in pytorch/")
    add("--private", action="store_true", help="make the repository private, if it is made")
    add("--revision", metavar="BRANCH", help="branch to commit to; default main")
    add("--message", default="", help="of the commit")
    add("--folder", metavar="DIR", help="write the files to this new folder and upload nothing")
    return parser


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parser().parse_args(argv)
    about: Mapping[str, Any] = {
        "results": args.results,
        "picture": args.picture,
        "licence": args.license,
        "pytorch": args.pytorch,
    }
    _check_name(args.repo)
    from detailflow_jax.inference import api

    model = api.load(args.model, weights=args.weights, step=args.step)
    if args.folder:
        write(model, files.local_path(args.folder, "--folder"), args.repo, **about)
        print(f"{args.folder}: what would be at hf:{args.repo}")
    else:
        options = {"private": args.private, "revision": args.revision, "message": args.message}
        print(push(model, args.repo, **about, **options))
    return 0
