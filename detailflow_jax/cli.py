"""The command `detailflow`: every command of the package as a subcommand.

    detailflow train --config configs/tokenizer.py:digits --workdir runs/tok

A subcommand is imported when it is called, so that `detailflow --help` starts without JAX. The
modules stay commands too: `python -m detailflow_jax.train` is `detailflow train`.
"""

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from detailflow_jax.runtime import platforms
from detailflow_jax.runtime.errors import closest_names

UNUSABLE = 2  # the exit code of a command line that cannot be used


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
      module: its `main(argv)` returns the exit code. Relative to the package.
      summary: its line in the help.
      distributed: whether several processes may run it together.
    """

    module: str
    summary: str
    distributed: bool = False

    def main(self, argv: Sequence[str]) -> int:
        """Runs it and returns its exit code."""
        return importlib.import_module(f"detailflow_jax.{self.module}").main(argv)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A subcommand that stands for several, chosen by its arguments.

    Attributes:
      summary: its line in the help.
      commands: what chooses -> name in `COMMANDS`. What chooses is an option, which is passed on,
        or a word, which has to be the first argument and is not.
      default: the name in `COMMANDS` if nothing chooses; empty: that is an error.
    """

    summary: str
    commands: Mapping[str, str]
    default: str = ""

    def find(self, argv: Sequence[str]) -> tuple[str, list[str]] | None:
        """(name in `COMMANDS`, its arguments), or None if the arguments choose nothing."""
        if argv and argv[0] in self.commands and not argv[0].startswith("-"):
            return self.commands[argv[0]], list(argv[1:])
        for argument in argv:
            option = argument.partition("=")[0]
            if option.startswith("-") and option in self.commands:
                return self.commands[option], list(argv)
        return (self.default, list(argv)) if self.default else None


COMMANDS = {
    "train": Command("train", "train a tokenizer, generator, VAE or FlowAR; resumes", True),
    "extract-codes": Command(
        "inference.extract_codes", "encode images into codes, to train a generator on", True
    ),
    "extract-latents": Command(
        "inference.extract_latents", "encode images into latents, to train FlowAR on", True
    ),
    "generate": Command("inference.generate", "sample images of given classes", True),
    "edit": Command("inference.edit", "paint a part of an image anew, or around it (FlowAR)"),
    "vary": Command("inference.vary", "keep an image's first tokens, sample the others"),
    "upscale": Command("inference.upscale", "enlarge small images by sampled detail (DetailFlow)"),
    "app": Command("app.__main__", "the models in the browser, to play with"),
    "evaluate": Command("evaluate.__main__", "score samples or reconstructions", True),
    "convert": Command("convert.__main__", "convert checkpoints from and to PyTorch"),
    "push": Command("inference.hub", "upload a model to the Hugging Face hub, with a card"),
    "weights": Command("runtime.weights", "list the published weights that a recipe needs"),
    "classes": Command("data.classes", "list the class names of images, codes or a trained model"),
    "prepare": Command("data.prepare", "prepare ImageNet or another TFDS dataset for training"),
    "compile-pod": Command("pod.command", "compile a program for a TPU pod, without a TPU"),
    "demo-detailflow": Command("demo.__main__", "DetailFlow on handwritten digits"),
    "demo-flowar": Command("demo.flowar", "FlowAR on handwritten digits"),
    "demo-photos": Command("demo.photos", "tokenizer and autoencoder on patches of photographs"),
    "demo-adversarial": Command("demo.adversarial", "a discriminator on handwritten digits"),
}
CHOICES = {
    "extract": Choice(
        "extract-codes with --tokenizer, extract-latents with --vae",
        {"--tokenizer": "extract-codes", "--vae": "extract-latents"},
    ),
    "demo": Choice(
        "both systems on handwritten digits: demo [flowar|photos|adversarial]",
        {
            "detailflow": "demo-detailflow",
            "flowar": "demo-flowar",
            "photos": "demo-photos",
            "adversarial": "demo-adversarial",
        },
        default="demo-detailflow",
    ),
}
_NAMED = [name for name in COMMANDS if not name.startswith("demo-")]
SHOWN = (_NAMED[0], "extract", *_NAMED[1:], "demo")
"""What `detailflow --help` lists, in this order."""


def help_text() -> str:
    """What `detailflow --help` prints."""
    lines = "\n".join(f"  {name:<16}{(CHOICES | COMMANDS)[name].summary}" for name in SHOWN)
    return f"""\
usage: detailflow COMMAND [OPTIONS]

DetailFlow and FlowAR in JAX: train, sample, evaluate and convert models.

commands:
{lines}

options:
  -h, --help      this text; `detailflow COMMAND --help` lists the options of a command
  --version       the version of the package

examples:
  detailflow demo --out runs/demo
  detailflow train --config configs/tokenizer.py:digits --workdir runs/tok
  detailflow extract --tokenizer runs/tok --source digits --out runs/codes
  detailflow train --config configs/generator.py:digits --workdir runs/gen \\
      --config.data.source=codes:runs/codes
  detailflow generate --tokenizer runs/tok --generator runs/gen --labels 0-9 --out samples

exit codes: 0 done; 2 the command line or its files cannot be used, the text says what to do; others
as `detailflow COMMAND --help` says."""


def run(name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and leaves the process with its exit code.

    Args:
      name: in `COMMANDS`.
      argv: its arguments; default, those of the process.
    """
    command, argv = COMMANDS[name], sys.argv[1:] if argv is None else argv
    computes = command.distributed or name.startswith("demo")
    platforms.choose(tell=computes and not {"-h", "--help"} & set(argv))
    code = command.main(argv)
    if command.distributed:
        from detailflow_jax.runtime import distributed

        distributed.leave(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `detailflow` with the given arguments, default those of the process, and leaves."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name, arguments = argv[0].replace("_", "-") if argv else "", argv[1:]
    if name in ("", "-h", "--help", "help"):
        print(help_text())
        sys.exit(0 if name else UNUSABLE)
    if name == "--version":
        from importlib import metadata

        print(f"detailflow_jax {metadata.version('detailflow_jax')}")
        sys.exit(0)
    if name in CHOICES:
        run(*_chosen(name, arguments))
    if name not in SHOWN:
        hint = closest_names(name, SHOWN)
        _unusable(f"unknown command {argv[0]!r}; {hint}; see detailflow --help")
    run(name, arguments)


def _chosen(name: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    choice = CHOICES[name]
    if found := choice.find(arguments):
        return found
    lines = [
        f"  {what:<14}detailflow {command:<17}{COMMANDS[command].summary}"
        for what, command in choice.commands.items()
    ]
    text = "\n".join([f"detailflow {name}: what it does depends on the option given", *lines])
    if "-h" in arguments or "--help" in arguments:
        print(f"{text}\n\neach has its own help, such as detailflow extract-codes --help")
        sys.exit(0)
    _unusable(f"expected one of {', '.join(choice.commands)}\n{text}")


def _unusable(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(UNUSABLE)


if __name__ == "__main__":
    main()
