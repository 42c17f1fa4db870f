"""The launchers, against stand-ins that record what gcloud, kubectl, xpk and Slurm are asked."""

import json
import pathlib
import shlex
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from launch_standins import ODD, ROOT, StandIns

LAUNCHERS = ("tpu_vm", "queued_resources", "babysit", "xpk", "jobset", "slurm")
TRAINING = ("--config", "configs/generator.py:detailflow_16", f"--config.name={ODD}")
COMMAND = [*("python", "-m", "detailflow_jax.train"), *TRAINING]
COMMAND += ["--workdir", "gs://bucket/runs/gpt-l"]
PLACE = ["--zone=us-west4-a", "--project=my-project"]


@pytest.fixture
def standins(tmp_path):
    return StandIns(tmp_path)


def tpu(group: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", group, *words, *PLACE]


# ---------------------------------------------------------------------------------- all launchers


def test_shellcheck():
    """All of `launch/`; it also follows what the scripts source."""
    scripts = sorted((ROOT / "launch").glob("*.sh*"))
    assert len(scripts) >= 11
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--external-sources", *scripts], check=True, cwd=ROOT)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_and_refusals(standins, launcher):
    start = None if launcher == "babysit" else "start"
    arguments = [] if start is None else ["start"]
    script = str(standins.repo / "launch" / f"{launcher}.sh")
    for help_text in ([script, "--help"], [script, *arguments, "--help"]):
        text = standins.execute(help_text).stdout
        assert f"usage: launch/{launcher}.sh" in text and "--run-name " in text
        assert "times to start again after" in text
    standins.run(launcher, start, "--nonsense", "1", *TRAINING, code=2)
    standins.run(launcher, start, "--run-name", "Has Space", *TRAINING, code=2)
    missing = standins.run(launcher, start, code=2)
    assert "nothing to run" in missing.stderr or "RUNS is" in missing.stderr
    with (standins.directory / "settings.sh").open("a") as settings:
        settings.write("TPU_TIPE=v6e-256\n")
    assert "TPU_TIPE" in standins.run(launcher, start, *TRAINING, code=2).stderr
    assert standins.calls == []


@pytest.mark.parametrize(
    ("launcher", "option"),
    [
        ("tpu_vm", "--num-slices"),
        ("queued_resources", "--poll-seconds"),
        ("babysit", "--nodes"),
        ("xpk", "--spot"),
        ("jobset", "--create-option"),
        ("slurm", "--tpu-type"),
    ],
)
def test_an_option_without_effect_is_an_error(standins, launcher, option):
    start = None if launcher == "babysit" else "start"
    told = standins.run(launcher, start, option, "2", *TRAINING, code=2).stderr
    assert f"{option} has no effect: launch/{launcher}.sh does not use it" in told
    assert standins.calls == []


@pytest.mark.parametrize(
    ("launcher", "option", "value"),
    [
        ("queued_resources", "--spot", "True"),
        ("queued_resources", "--num-slices", "0"),
        ("xpk", "--num-slices", "08"),
        ("slurm", "--nodes", "0"),
        ("jobset", "--tpu-topology", "0x0"),
        ("tpu_vm", "--env", "A-B=x"),
        ("tpu_vm", "--runs", "gs:/bucket/runs"),
        ("slurm", "--runs", "s3://bucket/runs"),
        ("babysit", "--runs", "gs://"),
        ("babysit", "--poll-seconds", "0"),
    ],
)
def test_a_value_that_would_be_taken_for_another_is_an_error(standins, launcher, option, value):
    start = None if launcher == "babysit" else "start"
    told = standins.run(launcher, start, option, value, *TRAINING, code=2).stderr
    assert "expected" in told and value in told
    assert standins.calls == []


def test_slashes_behind_runs_do_not_count(standins):
    runs = ["--runs", "gs://bucket/runs//", "--dry-run"]
    plan = standins.run("queued_resources", "start", *runs, *TRAINING).stdout
    assert "gs://bucket/runs/gpt-l" in plan and "runs//" not in plan


def test_the_babysitter_takes_the_options_of_its_launcher(standins):
    """And keeps its own from it."""
    options = ["--poll-seconds", "1", "--spot", "true", "--dry-run"]
    plan = standins.run("babysit", None, *options, "--num-slices", "2", *TRAINING).stdout
    assert "--node-count=2" in plan and "every 1 s" in plan
    script = str(standins.repo / "launch" / "babysit.sh")
    with_tpu_vm = [script, "--with", "tpu_vm", *options, "--num-slices", "2", *TRAINING]
    assert "--num-slices has no effect" in standins.execute(with_tpu_vm, code=2).stderr


@pytest.mark.parametrize("launcher", ["tpu_vm", "queued_resources", "xpk", "jobset", "slurm"])
def test_dry_run_prints_what_a_run_calls(standins, tmp_path, launcher):
    standins.answer("[[ $* != *describe* ]] || echo READY; [[ $* != *'storage cat'* ]] || exit 1")
    options = ["--env", f"NOTE={ODD}"]
    options += ["--create-option", "--labels=a b"] if launcher != "jobset" else []
    options += ["--spot", "true"] if launcher not in ("xpk", "slurm") else []
    options += ["--runs", str(tmp_path / "shared")] if launcher == "slurm" else []
    plan = standins.run(launcher, "start", "--dry-run", *options, *TRAINING).stdout
    assert standins.calls == [] and not (standins.repo / "build").exists()
    standins.run(launcher, "start", *options, *TRAINING)
    done = [call for call in standins.calls if "describe" not in call and "cat" not in call]
    # A shell reads the plan: what stands where a stand-in would be called must be the same.
    standins.forget()
    standins.execute(["bash", "-c", plan])
    planned = [call for call in standins.calls if "create" not in call or launcher != "tpu_vm"]
    assert [call for call in planned if call[1:3] != ["storage", "rm"]] == done
    for action in ("status", "logs", "stop"):
        if (launcher, action) != ("slurm", "logs"):  # That is `tail`, which goes on.
            standins.forget()
            standins.run(launcher, action, "--dry-run", *options)
            assert standins.calls == []
            standins.run(launcher, action, *options)
            assert standins.calls
    assert not (standins.home / "gone").exists()


# ---------------------------------------------------------------------------------------- TPU VMs


def test_tpu_vm_calls(standins):
    standins.answer("case $* in *describe*) echo READY ;; *'storage cat'*) exit 1 ;; esac")
    standins.run("tpu_vm", "start", "--env", f"NOTE={ODD}", *TRAINING)
    build = standins.repo / "build" / "launch"
    bundle, worker = str(build / "gpt-l.tar.gz"), str(build / "gpt-l.worker.sh")
    on_all = ("ssh", "gpt-l", "--worker=all")
    look = tpu("tpu-vm", "describe", "gpt-l", "--format=value(state)")
    assert standins.calls == [
        look,
        ["gcloud", "storage", "cat", "gs://bucket/runs/gpt-l.launch/exit_code"],
        tpu("tpu-vm", "scp", bundle, worker, "gpt-l:", "--worker=all"),
        tpu("tpu-vm", *on_all, "--command=bash gpt-l.worker.sh start"),
    ]
    files = subprocess.check_output(["tar", "-tzf", bundle], text=True).split()
    assert "launch/worker.sh" in files and not any("build" in name for name in files)

    standins.forget()
    standins.run("tpu_vm", "logs", "--log-worker", "3")
    standins.run("tpu_vm", "stop")
    standins.run("tpu_vm", "delete")
    tail = "--command=tail -n 200 -F detailflow/gpt-l/log"
    assert standins.calls == [
        tpu("tpu-vm", "ssh", "gpt-l", "--worker=3", tail),
        tpu("tpu-vm", *on_all, "--command=bash gpt-l.worker.sh stop"),
        tpu("tpu-vm", "delete", "gpt-l", "--quiet"),
    ]


def test_tpu_vm_is_created_where_there_is_none(standins):
    answers = "[[ $* != *describe* && $* != *'storage cat'* ]] || {{ echo {} >&2; exit 1; }}"
    standins.answer(answers.format("NOT_FOUND: no such node"))
    standins.run("tpu_vm", "start", "--spot", "true", "--create-option", "--network=a b", *TRAINING)
    kind = ["--accelerator-type=v5litepod-256", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert standins.calls[1] == tpu("tpu-vm", "create", "gpt-l", *kind, "--network=a b")
    # No answer is not the answer that there is none.
    standins.forget()
    standins.answer(answers.format("PERMISSION_DENIED"))
    failed = standins.run("tpu_vm", "start", *TRAINING, code=1)
    assert "PERMISSION_DENIED" in failed.stderr and len(standins.calls) == 1
    assert standins.run("tpu_vm", "state").stdout == "unknown\n"
    standins.answer("[[ $* != *'storage cat'* ]] || exit 1; echo PREEMPTED")
    assert "PREEMPTED" in standins.run("tpu_vm", "start", *TRAINING, code=2).stderr
    assert standins.run("tpu_vm", "state").stdout == "lost\n"


def test_queued_resources_calls(standins):
    standins.answer("[[ $* != *'storage cat'* ]] || { echo 1; exit; }")
    standins.run("queued_resources", "start", "--num-slices", "2", *TRAINING)
    build = standins.repo / "build" / "launch"
    beside = "gs://bucket/runs/gpt-l.launch"
    assert standins.calls == [
        ["gcloud", "storage", "cp", str(build / "gpt-l.tar.gz"), f"{beside}/code.tar.gz"],
        ["gcloud", "storage", "cat", f"{beside}/exit_code"],
        ["gcloud", "storage", "rm", "--quiet", f"{beside}/exit_code"],
        tpu(
            *("queued-resources", "create", "gpt-l", "--node-count=2", "--node-prefix=gpt-l"),
            *("--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"),
            f"--metadata-from-file=startup-script={build / 'gpt-l.worker.sh'}",
        ),
    ]
    standins.forget()
    standins.run("queued_resources", "stop")
    standins.run("queued_resources", "delete")
    stop = "--command=sudo bash /opt/detailflow/gpt-l/worker.sh stop"
    assert standins.calls == [
        tpu("queued-resources", "ssh", "gpt-l", "--node=all", "--worker=all", stop),
        tpu("queued-resources", "delete", "gpt-l", "--force", "--quiet"),
    ]


@pytest.mark.parametrize("with_", ["queued_resources", "tpu_vm"])
def test_babysitter_brings_a_lost_pod_back_under_one_name(standins, with_):
    (standins.directory / "bin" / "sleep").symlink_to("/bin/true")  # It looks at once.
    # What a look finds, one after another; the end is told by the bucket.
    states = {
        "queued_resources": "ABSENT WAITING_FOR_RESOURCES ACTIVE SUSPENDED ERROR ACTIVE END",
        "tpu_vm": "ABSENT ABSENT CREATING PREEMPTED ABSENT ERROR READY END",  # `start` looks too.
    }[with_]
    (standins.directory / "states").write_text(states.replace(" ", "\n") + "\n")
    standins.answer(
        f"states={standins.directory}/states\n"
        """case "$*" in
          *'storage cat'*) [[ $(head -1 $states) == END ]] && echo 7 || exit 1 ;;
          *describe*)
            state=$(head -1 $states); sed -i 1d $states
            case $state in
              ABSENT) echo NOT_FOUND >&2; exit 1 ;;
              ERROR) echo 'try again later' >&2; exit 1 ;;
              *) echo $state ;;
            esac ;;
        esac"""
    )
    arguments = ["--with", with_, "--settings", str(standins.directory / "settings.sh"), *TRAINING]
    script = str(standins.repo / "launch" / "babysit.sh")
    told = standins.execute([script, *arguments], code=7).stderr
    assert [line.rsplit(": ")[-1] for line in told.splitlines() if "gpt-l: " in line] == [
        *("absent", "waiting", *(["running"] if with_ == "queued_resources" else []), "lost"),
        *("unknown", "running", "done 7", "ended with 7"),
    ]
    changes = [call[4:6] for call in standins.calls if {"create", "delete"} & set(call)]
    assert changes == [[verb, "gpt-l"] for verb in ("create", "delete", "create", "delete")]
    # A finished run is not started again.
    standins.forget()
    standins.answer("[[ $* != *'storage cat'* ]] || echo 0")
    standins.execute([script, "--keep", *arguments])
    assert [call[1:3] for call in standins.calls] == [["storage", "cat"]]


# --------------------------------------------------------------------------- a host of a TPU pod

HOST = """case "$tool $*" in
  curl*) echo 0 ;;
  'gcloud storage cp - '*) cp "$call.input" "$HOME/result" ;;
  'gcloud storage cp gs:'*) cp "$HOME/gpt-l.tar.gz" "$4" ;;
  'gcloud storage cat'*) cat "$HOME/result" ;;
esac
"""


@pytest.fixture
def host(standins, request):
    """Runs the script that a host gets for `command`, here, with the home folder of the test."""
    standins.answer("[[ $* != *'storage cat'* ]] || exit 1; echo READY")

    def make(launcher: str, script: str) -> list[str]:
        options = ["--install", "touch installed", "--prepare", "echo prepared", "--env"]
        command = ["bash", "-c", script, ODD]
        standins.run(launcher, "start", *options, f"NOTE={ODD}", "--", *command)
        build = standins.repo / "build" / "launch"
        (build / "gpt-l.tar.gz").rename(standins.home / "gpt-l.tar.gz")
        text = (build / "gpt-l.worker.sh").read_text()
        worker = standins.home / "gpt-l.worker.sh"
        worker.write_text(text.replace("'/opt/", f"'{standins.home}/"))
        standins.answer(HOST)
        standins.forget()
        request.addfinalizer(lambda: standins.execute(["bash", str(worker), "stop"], code=None))
        return ["bash", str(worker)]

    return make


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_host_runs_until_the_end_and_tells_how_it_ended(standins, host):
    """Preempted twice, then failed, then done: under the same words each time."""
    script = 'echo "$0|$NOTE" >>~/seen; n=$(wc -l <~/seen); codes=(143 143 9 0); '
    script += "exit ${codes[n - 1]}"
    worker = host("tpu_vm", script)
    assert "installing gpt-l" in standins.execute([*worker, "start"]).stdout
    folder = standins.home / "detailflow" / "gpt-l"
    wait_for((standins.home / "result").exists)
    assert (standins.home / "result").read_text() == "0\n"
    assert (standins.home / "seen").read_text() == f"{ODD}|{ODD}\n" * 4
    assert (folder / "code" / "installed").exists() and (folder / "code" / "launch").exists()
    assert not (standins.home / "gone").exists()
    standins.execute([*worker, "status"], code=1)


def test_host_stops_a_run_that_saves(standins, host):
    script = "trap 'echo saved >~/saved; exit 143' TERM; touch ~/up; while :; do sleep 0.05; done"
    worker = host("tpu_vm", script)
    standins.execute([*worker, "start"])
    wait_for((standins.home / "up").exists)
    standins.execute([*worker, "status"])
    assert "stop it first" in standins.execute([*worker, "start"], code=1).stdout
    standins.execute([*worker, "stop"])
    assert (standins.home / "saved").exists() and not (standins.home / "result").exists()
    standins.execute([*worker, "status"], code=1)


def test_host_that_boots_fetches_the_code_and_runs_once(standins, host):
    worker = host("queued_resources", 'echo "$0" >>~/seen; exit 2')
    standins.execute(worker, code=2)
    folder = standins.home / "detailflow" / "gpt-l"
    log = (folder / "log").read_text()
    assert "prepared" in log and "the command left with 2" in log
    assert (standins.home / "result").read_text() == "2\n" and (folder / "worker.sh").exists()
    standins.execute(worker)
    assert (standins.home / "seen").read_text() == f"{ODD}\n"


# ------------------------------------------------------------------------------------- Kubernetes


def test_compiled_programs_are_kept_where_the_user_says(standins):
    own = "JAX_COMPILATION_CACHE_DIR=/mnt/compiled"
    plan = standins.run("xpk", "start", "--dry-run", "--env", own, *TRAINING).stdout
    assert plan.count("JAX_COMPILATION_CACHE_DIR") == 1 and f"--env={own}" in plan


def test_xpk_calls(standins):
    options = ["--env", f"NOTE={ODD}", "--create-option", "--priority=high", "--num-slices", "2"]
    standins.run("xpk", "start", *options, *TRAINING)
    standins.run("xpk", "status")
    standins.run("xpk", "logs")
    standins.run("xpk", "stop")
    place = ["--cluster=pods", *PLACE]
    create, *rest = standins.calls
    index = next(i for i, word in enumerate(create) if word.startswith("--command="))
    command = create.pop(index).removeprefix("--command=exec ")
    assert shlex.split(command) == COMMAND
    assert create == [
        *("xpk", "workload", "create", "--workload=gpt-l", "--tpu-type=v5litepod-256"),
        *("--num-slices=2", "--docker-image=registry/detailflow:1", "--max-restarts=1000"),
        *("--restart-on-exit-codes=143", "--termination-grace-period-seconds=300"),
        "--env=DETAILFLOW_GRACE_SECONDS=300",
        f"--env=NOTE={ODD}",
        "--env=JAX_COMPILATION_CACHE_DIR=gs://bucket/runs/gpt-l.launch/compiled",
        *("--priority=high", *place),
    ]
    pod = "jobset.sigs.k8s.io/jobset-name=gpt-l,jobset.sigs.k8s.io/job-index=0"
    pod += ",batch.kubernetes.io/job-completion-index=0"
    log = ["logs", "--follow", "--tail=200", f"--selector={pod}"]
    assert rest == [
        ["xpk", "workload", "list", "--filter-by-job=^gpt-l$", *place],
        ["kubectl", "--namespace=default", *log],
        ["xpk", "workload", "delete", "--workload=gpt-l", "--force", *place],
    ]


SCHEMA = json.loads(
    (pathlib.Path(__file__).parents[1] / "fixtures" / "jobset_schema.json").read_text()
)


def test_jobset_is_valid_and_keeps_odd_words(standins):
    """What kubectl gets; `$(` would be replaced by Kubernetes, `$$(` stands for it."""
    words = ["python", "-c", 'print("a\\n")\n\tpass', ODD, "@NAME@", ""]
    standins.run("jobset", "start", "--env", f"NOTE={ODD}", "--env", "LINE=a\nb", "--", *words)
    assert standins.calls == [["kubectl", "--namespace=default", "create", "--filename=-"]]
    (text,) = standins.inputs("kubectl")
    jobset = yaml.safe_load(text)
    jsonschema.validate(jobset, SCHEMA)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == [word.replace("$(", "$$(") for word in words]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["NOTE"] == ODD.replace("$(", "$$(") and environment["LINE"] == "a\nb"
    assert environment["JAX_NUM_PROCESSES"] == "64" and job["completions"] == 64
    # Preemption restarts without limit; the first rule that matches a pod decides.
    codes, lost = job["podFailurePolicy"]["rules"]
    assert (
        codes["onExitCodes"]["values"] == [143] and codes["action"] == lost["action"] == "FailJob"
    )
    assert codes["onExitCodes"]["containerName"] == container["name"]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert "cloud.google.com/gke-spot" not in text and "queue-name" not in text
    for broken in (text.replace("backoffLimit", "backofLimit"), text.replace("In,", "Is,")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(broken), SCHEMA)


@pytest.mark.parametrize(
    ("tpu_type", "accelerator", "topology", "hosts", "chips"),
    [
        ("v5litepod-8", "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v6e-128", "tpu-v6e-slice", "8x16", 32, 4),
        ("v6e-256", "tpu-v6e-slice", "16x16", 64, 4),
        ("v5p-8", "tpu-v5p-slice", "2x2x1", 1, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v5p-512", "tpu-v5p-slice", "4x8x8", 64, 4),
    ],
)
def test_jobset_asks_for_the_pod(standins, tpu_type, accelerator, topology, hosts, chips):
    options = ["--tpu-type", tpu_type, "--num-slices", "2", "--spot", "true", "--queue", "q"]
    text = standins.run("jobset", "print", *options, *TRAINING).stdout
    jobset = yaml.safe_load(text)
    jsonschema.validate(jobset, SCHEMA)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert f'value: "{2 * hosts}"' in text
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"


# ------------------------------------------------------------------------------------------ Slurm


@pytest.fixture
def slurm(tmp_path):
    return StandIns(tmp_path, settings=f"RUNS='{tmp_path}/shared disk'\nNODES=2\n")


def test_slurm_calls(slurm, tmp_path):
    folder = f"{tmp_path}/shared disk/gpt-l.launch"
    slurm.run("slurm", "start", "--time-limit", "2-00:00:00", *TRAINING)
    slurm.run("slurm", "status")
    slurm.run("slurm", "stop")
    mine = ["--jobname=gpt-l", "--user=somebody"]
    assert slurm.calls == [
        [
            *("sbatch", "--job-name=gpt-l", "--nodes=2", "--ntasks-per-node=8"),
            *("--gpus-per-node=8", "--requeue", "--open-mode=append", f"--output={folder}/log"),
            *("--signal=TERM@300", "--time=2-00:00:00"),
        ],
        ["squeue", "--name=gpt-l", "--user=somebody"],
        ["scancel", *mine, "--state=PENDING"],
        ["scancel", *mine, "--state=RUNNING", "--signal=TERM"],
    ]
    assert pathlib.Path(folder, "stop").exists()


@pytest.mark.parametrize(
    ("codes", "stopped", "requeued", "left_with"),
    [
        ([143], False, True, 0),
        ([143], True, False, 143),
        ([9, 0], False, False, 0),
        ([2], False, False, 2),
        ([9, 9], False, False, 9),
    ],
)
def test_slurm_job_is_queued_again_when_preempted(slurm, codes, stopped, requeued, left_with):
    """The script that sbatch got, run here; srun runs the command as it is."""
    slurm.answer('[[ $tool != srun ]] || { shift 2; exec "$@"; }')
    script = f'codes=({" ".join(map(str, codes))}); echo "$0|$NOTE" >>~/seen; '
    script += "n=$(wc -l <~/seen); exit ${codes[n - 1]}"
    options = ["--max-failures", "1", "--env", f"NOTE={ODD}", "--prepare", "echo 'it is' ready"]
    slurm.run("slurm", "start", *options, "--", "bash", "-c", script, ODD)
    (job,) = slurm.inputs("sbatch")
    if stopped:
        slurm.run("slurm", "stop")
    slurm.forget()
    done = slurm.execute(["bash", "-c", job], code=left_with, SLURM_JOB_ID="41")
    assert "it is ready" in done.stdout
    assert (slurm.home / "seen").read_text() == f"{ODD}|{ODD}\n" * len(codes)
    assert (["scontrol", "requeue", "41"] in slurm.calls) == requeued
    assert all(call[1:3] == ["--kill-on-bad-exit=0", "--wait=300"] for call in slurm.calls[:1])
