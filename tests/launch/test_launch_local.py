"""`launch/local.sh -n`: several processes on this machine that live and leave together."""

import os
import pathlib
import signal
import subprocess
import time

import psutil
import pytest

LOCAL = str(pathlib.Path(__file__).parents[2] / "launch" / "local.sh")
PREEMPTED = 143


def launch(*arguments: str, script: str, code: int) -> str:
    command = [LOCAL, *arguments, "--", "bash", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_processes_know_their_place_and_are_told_apart():
    script = 'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"; echo two >&2'
    lines = launch("-n", "3", script=script, code=0).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        [f"[{i}] {i}/3 at 127.0.0.1" for i in range(3)] + [f"[{i}] two" for i in range(3)]
    )
    ports = {line.rsplit(":")[1] for line in lines if "at" in line}
    assert len(ports) == 1 and int(ports.pop()) > 1023


def test_compiled_programs_are_kept_on_this_host(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a b")
    script = 'echo "$JAX_COMPILATION_CACHE_DIR"'
    assert launch(script=script, code=0).strip() == os.environ["JAX_COMPILATION_CACHE_DIR"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    kept = f"/home/a b/.cache/detailflow_jax/compiled/{os.uname().nodename}"
    assert launch(script=script, code=0).strip() == kept


@pytest.mark.parametrize("option", ["--log-dir", "--grace"])
def test_an_option_of_several_is_an_error_for_one(option):
    assert f"{option} has no effect" in launch(option, "3", script="true", code=2)


def test_output_goes_to_files(tmp_path):
    told = launch("-n", "2", "--log-dir", str(tmp_path / "a b"), script="echo out", code=0)
    assert told == ""
    logs = sorted((tmp_path / "a b").iterdir())
    assert [log.name for log in logs] == ["process_0.log", "process_1.log"]
    assert all(log.read_text() == "out\n" for log in logs)


def test_the_first_failure_stops_the_others_and_what_they_started(tmp_path, monkeypatch):
    """Process 0 leaves on SIGTERM, with a child that would stay; process 2 hangs."""
    script = f"""
    echo $$ >>{tmp_path}/pids
    case $JAX_PROCESS_ID in
      0) trap 'exit 5' TERM; sleep 100 & echo $! >>{tmp_path}/pids; wait ;;
      1) while [[ $(wc -l <{tmp_path}/pids) != 4 ]]; do sleep 0.05; done; exit 7 ;;
      2) trap '' TERM; sleep 100; sleep 100 ;;
    esac"""
    monkeypatch.setenv("DETAILFLOW_KILL_SECONDS", "2")
    start = time.monotonic()
    told = launch("-n", "3", script=script, code=7)
    assert "process 1 left with 7" in told and "process(es) 2 did not leave: killed" in told
    assert 2 <= time.monotonic() - start < 20
    pids = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
    left = [process.info for process in psutil.process_iter(["pid", "status"])]
    left = [info for info in left if info["pid"] in pids]
    assert all(info["status"] == psutil.STATUS_ZOMBIE for info in left), left


@pytest.mark.parametrize(
    ("codes", "left_with"),
    [((143, 143), 143), ((143, 0), 1), ((0, 0), 0), ((0, 9), 9), ((143, 9), 9)],
)
def test_exit_code_of_all(codes, left_with):
    # The second one later, so that the first is known to be the first.
    script = f"codes=({codes[0]} {codes[1]}); sleep 0.$((JAX_PROCESS_ID * 3))"
    script += "; exit ${codes[JAX_PROCESS_ID]}"
    launch("-n", "2", "--max-restarts", "0", script=script, code=left_with)


def test_one_wrong_command_line_outranks_the_failures_that_it_causes():
    script = "trap 'exit 2' TERM; ((JAX_PROCESS_ID)) && exit 1; while :; do sleep 0.1; done"
    launch("-n", "2", "--max-failures", "5", script=script, code=2)


def test_one_that_was_not_told_of_the_preemption_is_stopped():
    script = "((JAX_PROCESS_ID)) || exit 143; sleep 100"
    told = launch("-n", "2", "--grace", "0", "--max-restarts", "0", script=script, code=137)
    assert "process(es) 1 did not leave: killed" in told


def test_all_are_started_again_after_a_preemption_or_a_failure(tmp_path):
    script = f"""
    echo x >>{tmp_path}/$JAX_PROCESS_ID
    codes=(143 9 143 0)
    exit ${{codes[$(wc -l <{tmp_path}/$JAX_PROCESS_ID) - 1]}}"""
    launch("-n", "2", "--max-failures", "1", "--grace", "5", script=script, code=0)
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["x\n" * 4] * 2


def ignore_sigint() -> None:
    """What a shell without job control does for what it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("preexec", [None, ignore_sigint])
@pytest.mark.parametrize("whole_group", [False, True])
def test_being_asked_to_leave_reaches_all_once_and_is_the_end(whole_group, preexec):
    """A signal to the launcher, and Ctrl-C, which the terminal sends to what it waits with too."""
    script = "trap 'echo asked; exit 143' TERM; echo up; while :; do sleep 0.05; done"
    command = [LOCAL, "-n", "2", "--", "bash", "-c", script]
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, preexec_fn=preexec, **options) as child:
        try:
            assert sorted(child.stdout.readline() for _ in range(2)) == ["[0] up\n", "[1] up\n"]
            if whole_group:
                os.killpg(child.pid, signal.SIGINT)
            else:
                child.terminate()
            told = child.communicate(timeout=30)[0]
        except BaseException:
            child.kill()
            raise
        assert sorted(told.splitlines()) == ["[0] asked", "[1] asked"]
    assert child.returncode == PREEMPTED


def test_one_process_can_be_interrupted_when_the_launcher_runs_in_the_background():
    script = "import signal; print(signal.getsignal(signal.SIGINT) == signal.default_int_handler)"
    command = [LOCAL, "--", "python", "-c", script]
    told = subprocess.check_output(command, preexec_fn=ignore_sigint, text=True, timeout=60)
    assert told == "True\n"


def test_processes_meet_in_spite_of_a_proxy():
    script = "import jax; from detailflow_jax.runtime import distributed; distributed.start(); "
    script += "print(f'{jax.process_count()} processes')"
    proxy = "http://127.0.0.1:9"  # Nobody listens there.
    told = subprocess.run(
        [LOCAL, "-n", "2", "--", "python", "-c", script],
        env=os.environ | {"http_proxy": proxy, "https_proxy": proxy, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert told.count("2 processes") == 2


def test_dry_run_of_several():
    command = [LOCAL, "-n", "2", "--cpu-devices", "4", "--dry-run", "--", "echo", "a b"]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert "xla_force_host_platform_device_count=4" in lines[-3]
    assert lines[-1].startswith("env JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT ")
    assert lines[-1].endswith(r"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 echo a\ b &")
    assert subprocess.run([LOCAL, "-n", "0", "--", "true"], capture_output=True).returncode == 2
