#!/usr/bin/env bash
# Runs a command on this machine and starts it again while it leaves preempted.
set -euo pipefail

readonly PREEMPTED=143 # detailflow_jax.train.PREEMPTED: SIGTERM came, the state is saved.
readonly USAGE="\
usage: launch/local.sh [options] TRAINING-OPTIONS
       launch/local.sh [options] -- COMMAND [ARGUMENT ...]

Trains (python -m detailflow_jax.train TRAINING-OPTIONS) or runs COMMAND on this machine, and
starts it again while it leaves with $PREEMPTED: preempted, its state saved.

  --venv DIR          virtual environment to activate (default: .venv of this repository, if any)
  --cpu-devices N     let JAX see N devices on the CPU, to try a mesh
  --max-restarts N    give up after N restarts (default: 1000)
  --dry-run           print what would run, and leave
  --help              this text

example: launch/local.sh --config configs/tokenizer.py:digits --workdir runs/tok
Ctrl-C or SIGTERM reaches the command, which saves and leaves; it is then not started again."

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
cpu_devices=
max_restarts=1000
dry_run=false
command=()

fail() {
  printf 'launch/local.sh: %s (see --help)\n' "$1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --help) printf '%s\n' "$USAGE"; exit 0 ;;
    --dry-run) dry_run=true; shift ;;
    --venv | --cpu-devices | --max-restarts)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --venv) [[ -f $2/bin/activate ]] || fail "no virtual environment in $2"; venv=$2 ;;
        --cpu-devices) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: not a number"; cpu_devices=$2 ;;
        --max-restarts) [[ $2 =~ ^[0-9]+$ ]] || fail "$1 $2: not a number"; max_restarts=$2 ;;
      esac
      shift 2
      ;;
    --) shift; command=("$@"); break ;;
    --config | --config=* | --workdir | --workdir=* | --config.*)
      command=(python -m detailflow_jax.train "$@"); break ;;
    *) fail "unknown option $1" ;;
  esac
done
((${#command[@]})) || fail "nothing to run"

setup=()
[[ -f $venv/bin/activate ]] && setup+=("source $(printf %q "$venv")/bin/activate")
if [[ -n $cpu_devices ]]; then
  flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$cpu_devices"
  setup+=("export JAX_PLATFORMS=cpu XLA_FLAGS=$(printf %q "$flags")")
fi

if $dry_run; then
  ((${#setup[@]})) && printf '%s\n' "${setup[@]}"
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
((${#setup[@]})) && for line in "${setup[@]}"; do eval "$line"; done

child=
stopping=false
stop() {
  stopping=true
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null || true
}
trap stop INT TERM

for ((restarts = 0; ; restarts++)); do
  "${command[@]}" &
  child=$!
  code=0
  # A trapped signal ends `wait` early: go on until the command itself is gone.
  while wait "$child" && code=0 || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  if ((code != PREEMPTED)) || $stopping; then
    exit "$code"
  fi
  if ((restarts >= max_restarts)); then
    printf 'launch/local.sh: preempted again after %d restarts\n' "$restarts" >&2
    exit "$code"
  fi
  printf 'launch/local.sh: preempted, starting again\n' >&2
done
