"""Programs that tests run in processes of their own."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import psutil

ROOT = pathlib.Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """Variables under which Python finds the package and these helpers, and shows its stacks."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    return os.environ | own | more


def xla_flags(*flags: str) -> str:
    """A value of XLA_FLAGS: this process's flags and some more."""
    return " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()


def start(*command, **variables: str) -> subprocess.Popen:
    """A process of its own, whose standard output and errors are one stream of text."""
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child: subprocess.Popen, timeout: float = 240) -> str:
    """What a child prints until its end. One that hangs is aborted, and fails with its stacks."""
    family = [] if child.poll() is not None else [psutil.Process(child.pid)]
    try:
        return child.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        family += [each for one in family for each in one.children(recursive=True)]
        signal_all(family[::-1], signal.SIGABRT)
        printed = child.communicate(timeout=60)[0]
        raise AssertionError(f"did not end within {timeout} s:\n{printed}") from None
    finally:
        signal_all(family, signal.SIGKILL)


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def run(*arguments, timeout: float = 240, code: int = 0, **variables: str) -> str:
    """Runs Python until it ends with an exit code, and returns what it printed."""
    child = start(sys.executable, *arguments, **variables)
    printed = finish(child, timeout)
    assert child.returncode == code, f"exit code {child.returncode}:\n{printed}"
    return printed


def run_on_eight_devices(*arguments, **options) -> str:
    """`run`, on eight devices of this machine's processor."""
    flags = xla_flags("--xla_force_host_platform_device_count=8")
    return run(*arguments, XLA_FLAGS=flags, **options)
