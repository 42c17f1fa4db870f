"""Stand-ins for gcloud, kubectl, xpk and Slurm: they record their calls, and answer as told."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = (
    *("gcloud", "kubectl", "xpk", "curl"),
    *("sbatch", "srun", "scancel", "scontrol", "squeue"),
)

# A call becomes a file of its words, and one of what came in; the answer is a shell script.
RECORDER = """#!/usr/bin/env bash
call=$(mktemp "$STANDIN_CALLS/$(date +%s%N).XXXX")
printf '%s\\0' "${0##*/}" "$@" >"$call.words"
[[ ${0##*/} == srun ]] || cat >"$call.input"
rm "$call"
tool=${0##*/}
source "$STANDIN_ANSWERS"
"""

ODD = 'two words; $(touch gone) "quoted" it\'s \\ * ~'  # What bad quoting would break.

SETTINGS = """
RUN_NAME=gpt-l
RUNS=gs://bucket/runs
PROJECT=my-project
ZONE=us-west4-a
TPU_TYPE=v5litepod-256
TPU_VERSION=v2-alpha-tpuv5-lite
CLUSTER=pods
IMAGE=registry/detailflow:1
POLL_SECONDS=1
"""


class StandIns:
    """The launchers in a small git checkout of their own, and a PATH with stand-ins.

    `calls` is what the stand-ins were asked, in words.
    """

    def __init__(self, directory: pathlib.Path, *, answers: str = "", settings: str = ""):
        self.directory = directory
        self.home, self.repo = directory / "home", directory / "repo"
        shutil.copytree(ROOT / "launch", self.repo / "launch")
        (self.repo / "launch" / "settings.sh").unlink(missing_ok=True)
        (self.repo / ".gitignore").write_text("/build/\n")
        subprocess.run(["git", "init", "--quiet", self.repo], check=True)
        for name in ("bin", "calls", "home"):
            (directory / name).mkdir()
        for tool in TOOLS:
            path = directory / "bin" / tool
            path.write_text(RECORDER)
            path.chmod(0o755)
        self.answer(answers)
        (directory / "settings.sh").write_text(SETTINGS + settings)
        python = str(pathlib.Path(sys.executable).parent)
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(directory / "bin"), python, os.environ["PATH"]]),
            "HOME": str(self.home),
            "USER": "somebody",
            "STANDIN_CALLS": str(directory / "calls"),
            "STANDIN_ANSWERS": str(directory / "answers.sh"),
        }

    def answer(self, script: str) -> None:
        """What the stand-ins do after recording: a script that sees $tool and the arguments."""
        (self.directory / "answers.sh").write_text(script)

    def run(self, launcher: str, action: str | None, *arguments: str, code: int | None = 0):
        command = [str(self.repo / "launch" / f"{launcher}.sh")]
        if action is not None:
            command.append(action)
        command += ["--settings", str(self.directory / "settings.sh"), *arguments]
        return self.execute(command, code=code)

    def execute(self, command: list[str], *, code: int | None = 0, **environment: str):
        result = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert code is None or result.returncode == code, result.stdout + result.stderr
        return result

    @property
    def calls(self) -> list[list[str]]:
        paths = sorted((self.directory / "calls").glob("*.words"))
        return [path.read_text().split("\0")[:-1] for path in paths]

    def inputs(self, tool: str) -> list[str]:
        """What `tool` read, a text a call."""
        paths = sorted((self.directory / "calls").glob("*.words"))
        return [
            path.with_suffix(".input").read_text()
            for path in paths
            if path.read_text().split("\0")[0] == tool
        ]

    def forget(self) -> None:
        for path in (self.directory / "calls").iterdir():
            path.unlink()
