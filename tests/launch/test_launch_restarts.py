"""`launch/local.sh` with one process: which commands it starts again, and what it passes on."""

import pathlib
import subprocess

from detailflow_jax.train import PREEMPTED

ROOT = pathlib.Path(__file__).parents[2]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "launch" / "local.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_launcher_restarts_a_preempted_command_only(tmp_path):
    log = tmp_path / "log"
    script = f"echo x >> {log}; [ $(wc -l < {log}) -ge 3 ] && exit 7; exit {PREEMPTED}"
    assert launch("--", "bash", "-c", script).returncode == 7
    assert len(log.read_text().splitlines()) == 3
    log.unlink()
    assert launch("--max-restarts", "1", "--", "bash", "-c", script).returncode == PREEMPTED
    assert len(log.read_text().splitlines()) == 2


def test_launcher_passes_sigterm_on_and_does_not_restart(tmp_path):
    script = f"trap 'exit {PREEMPTED}' TERM; echo up; while :; do sleep 0.05; done"
    command = [str(ROOT / "launch" / "local.sh"), "--", "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        child.terminate()
        assert child.stdout.read() == ""
    assert child.returncode == PREEMPTED


def test_launcher_tells_what_it_would_do():
    dry = launch("--dry-run", "--cpu-devices", "4", "--config", "a b.py", "--workdir", "w")
    assert dry.returncode == 0
    assert "--xla_force_host_platform_device_count=4" in dry.stdout
    assert r"-m detailflow_jax.train --config a\ b.py --workdir w" in dry.stdout
    assert "--max-restarts" in launch("--help").stdout
    assert launch("--nonsense").returncode == 2
