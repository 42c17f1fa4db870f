"""The commands that docs/reproduce.md gives for a pod, from images to scores, in a bucket.

They are taken from the page, with small networks and few images. Launchers, hosts' script, commands
and bucket are real; gcloud is a stand-in, which makes a pod of two hosts out of this machine. Each
step has hosts of its own, so that nothing comes from the disk of an earlier one.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest

import bucket_server
import children
import detailflow_jax as df
import siglip_files
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.data.prepare import main as prepare
from detailflow_jax.models import siglip
from detailflow_jax.models.vae import VAEConfig
from imagenet_tars import encoded, photo, write_tars
from launch_standins import StandIns
from random_weights import random_like

ROOT = pathlib.Path(__file__).parents[2]
SIZE = 64
SIGLIP = siglip.ViTConfig(width=96, depth=2, num_heads=4, mlp_dim=192)  # As `runlocal` has it.
VAE = VAEConfig(channels=32, res_blocks=1)
CODES = "--config.model.num_tokens=32 --config.model.codebook_size=256 --config.total_steps=2"
TOKENIZER = f"{CODES} --config.model.image_size={SIZE} --config.data.image_size={SIZE}"
TOKENIZER += " --config.batch_size=4 --config.full_probability=1.0"  # One size, one program.
SMALLER = {
    "gs://BUCKET": f"gs://{bucket_server.BUCKET}",
    "/mnt/data": "MOUNT",
    ":detailflow_16 ": ":detailflow_16:runlocal ",
    ":detailflow_16:size=": ":detailflow_16:runlocal,size=",
    "--config.teacher.path=$S": f"--config.teacher.path=$S {TOKENIZER}",
    ",codes=$B/codes-16": f",codes=$B/codes-16 {CODES}",
    "--vae $V": f"--vae $V --image_size {SIZE}",
    ":flowar_s:latents=$B/latents": ":flowar_s:runlocal,latents=$B/latents --config.total_steps=2",
    "--num_steps 25": "--num_steps 2",
    "--num_samples 50000": "--num_samples 16 --batch_size 8 --features pixels",
}
"""What stands on the page -> what is run; the size of the networks, and places."""

GCLOUD = r"""
object() { local name=${1#gs://*/}; printf %s "${name//\//%2F}"; }
ask() { command -p curl --noproxy '*' -sf "$@"; }
fetch() { ask "$STORAGE_EMULATOR_HOST/storage/v1/b/BUCKET/o/$(object "$1")?alt=media"; }
send() {
  ask -o /dev/null --data-binary "@$1" -H 'Content-Type: application/octet-stream' \
    "$STORAGE_EMULATOR_HOST/upload/storage/v1/b/BUCKET/o?uploadType=media&name=$(object "$2")"
}
boot() { # POD SCRIPT: two hosts, which find each other by these variables.
  local host port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  for host in 0 1; do
    mkdir -p "$1/$host"
    sed "s|'/opt/|'$1/$host/|" "$2" >"$1/$host/boot.sh"
    HOME=$1/$host JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=$host \
      setsid bash "$1/$host/boot.sh" </dev/null >"$1/$host/output" 2>&1 &
    echo $! >>"$HOME/groups"
  done
}
pod=$HOME/pods/${5:-}
case "$tool $*" in
  curl*) echo "$JAX_PROCESS_ID" ;;
  'gcloud storage cp - '*) send "$call.input" "$4" ;;
  'gcloud storage cp gs:'*) fetch "$3" >"$4" ;;
  'gcloud storage cp '*) send "$3" "$4" ;;
  'gcloud storage cat '*) fetch "$3" ;;
  *' create '*) [[ $* =~ startup-script=([^ ]+) ]] && boot "$pod" "${BASH_REMATCH[1]}" ;;
  *' describe '*) [[ -d $pod ]] && echo ACTIVE || { echo NOT_FOUND >&2; exit 1; } ;;
  *' delete '*) mv "$pod" "$HOME/deleted.$5" ;;
  *) echo "not expected: $tool $*" >&2; exit 1 ;;
esac
""".replace("BUCKET", bucket_server.BUCKET)

SETTINGS = """
RUNS=gs://BUCKET/runs
ZONE=us-west4-a
TPU_VERSION=v2-alpha-tpuv6e
INSTALL=true
POLL_SECONDS=1
MAX_FAILURES=0
""".replace("BUCKET", bucket_server.BUCKET)


def commands(mount: pathlib.Path, system: str) -> str:
    """Of the shell block of the page's section, the variables and a system's steps, made small."""
    page = (ROOT / "docs" / "reproduce.md").read_text()
    block = re.search(r"## The same on a pod\n.*?```sh\n(.*?)```", page, re.DOTALL)[1]
    for there, here in SMALLER.items():
        assert there in block, f"docs/reproduce.md no longer says {there!r}"
        block = block.replace(there, here.replace("MOUNT", os.fspath(mount)))
    variables, *steps = re.split(r"^# (\w+)$", block, flags=re.MULTILINE)
    return variables + dict(zip(steps[::2], steps[1::2], strict=True))[system]


def fill(bucket: bucket_server.Bucket, folder: pathlib.Path, mount: pathlib.Path) -> None:
    """What the page takes as given: ImageNet on the mount, the other files in the bucket."""
    training = {
        synset: {f"{synset}_{i}.JPEG": encoded(photo(4 * k + i)) for i in range(4)}
        for k, synset in enumerate(("n01440764", "n01443537"))
    }
    validation = {"ILSVRC2012_val_00000001.JPEG": encoded(photo(9))}
    write_tars(mount / "tfds", training, validation)
    assert prepare([f"--data_dir={mount / 'tfds'}", "--partial"]) == 0
    siglip_files.vision_model(SIGLIP).save_pretrained(folder / "siglip")
    bucket.put(folder / "siglip", "weights/siglip2-so400m-patch16-naflex")
    vae = df.VAE(VAE, random_like(NETWORKS["vae"].abstract(VAE, scan=False)))
    df.save_pytorch(vae, folder / "kl16.ckpt")
    bucket.write("weights/kl16.ckpt", (folder / "kl16.ckpt").read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), np.uint8)
    np.savez(folder / "reference.npz", images)
    bucket.write("VIRTUAL_imagenet256_labeled.npz", (folder / "reference.npz").read_bytes())


def kill_hosts(home: pathlib.Path) -> None:
    for group in (home / "groups").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page_lead_to_scores(tmp_path):
    with bucket_server.shared() as bucket:
        run_on_pod(bucket, tmp_path, "DetailFlow")
        manifest = json.loads(bucket.read("runs/codes-16/manifest.json"))
        assert (manifest["num_records"], manifest["num_crops"]) == (8, 10)
        check(bucket, runs=("tok-16", "gen-16"), scores="scores-16", scales=[1.3, 1.45, 1.6])


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_those_of_flowar_too(tmp_path):
    with bucket_server.shared() as bucket:
        run_on_pod(bucket, tmp_path, "FlowAR")
        manifest = json.loads(bucket.read("runs/latents/manifest.json"))
        assert (manifest["num_records"], manifest["latent_shape"]) == (8, [4, 4, 16])
        check(bucket, runs=("flowar-s",), scores="scores-s", scales=[4.3])


def run_on_pod(bucket: bucket_server.Bucket, folder: pathlib.Path, system: str) -> None:
    """Runs the page's steps of a system."""
    mount = folder / "mnt"
    pod = StandIns(folder, answers=GCLOUD)
    for room in ("configs", "detailflow_jax"):
        shutil.copytree(ROOT / room, pod.repo / room, ignore=shutil.ignore_patterns("__pycache__"))
    (pod.repo / "launch" / "settings.sh").write_text(SETTINGS)
    # A host has neither this checkout on its path nor the tests' compiled programs.
    own = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in pod.environment.items() if k not in own}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiles faster.
        "XLA_FLAGS": children.xla_flags("--xla_force_host_platform_device_count=2"),
    }
    fill(bucket, folder, mount)
    try:
        child = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands(mount, system)],
            cwd=pod.repo,
            env=environment | bucket.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        printed = children.finish(child, timeout=1700)
    finally:
        kill_hosts(pod.home)
    hosts = sorted(pod.home.rglob("output"))
    assert child.returncode == 0, printed + "\n".join(x.read_text() for x in hosts)


def check(
    bucket: bucket_server.Bucket, *, runs: tuple[str, ...], scores: str, scales: list[float]
) -> None:
    """That runs and scores lie in the bucket, and that launchers were told of the end."""
    names = bucket.names("runs/")
    for run in runs:
        assert f"runs/{run}/checkpoints/2/commit_success.txt" in names
        assert any(name.startswith(f"runs/{run}.launch/compiled/") for name in names)
    rows = json.loads(bucket.read(f"runs/{scores}/results.json"))["rows"]
    assert [row["cfg_scale"] for row in rows] == scales
    assert bucket.read(f"runs/{scores}.launch/exit_code") == b"0\n"
