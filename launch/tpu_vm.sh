#!/usr/bin/env bash
# Runs a command on all hosts of a TPU VM, by scp and ssh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

export USES="RUN_NAME RUNS ENVIRONMENT PROJECT ZONE TPU_TYPE TPU_VERSION SPOT CREATE_OPTIONS
INSTALL PREPARE MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER"
export USAGE="\
usage: launch/tpu_vm.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     create the TPU VM where there is none, send it this code, install it, and run
            python -m detailflow_jax.train TRAINING-OPTIONS, or COMMAND, on every host;
            started again while it leaves preempted
  status    the state of the TPU VM, and of the command on every host
  logs      follow the log of one host
  stop      let the run save and leave; the TPU VM stays, and costs
  delete    delete the TPU VM
  state     one word for scripts: absent, waiting, running, idle, lost, unknown; or: done CODE

example: launch/tpu_vm.sh start --run-name gpt-l --config configs/generator.py:detailflow_16"

tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }

# worker ACTION: launch/worker.sh ACTION on every host.
worker() { tpu ssh "$RUN_NAME" --worker=all --command="bash $RUN_NAME.worker.sh $1"; }

look() { DRY_RUN=false tpu describe "$RUN_NAME" --format='value(state)'; }

create() {
  need TPU_TYPE TPU_VERSION
  local spot=()
  [[ $SPOT != true ]] || spot=(--spot)
  tpu create "$RUN_NAME" --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION" \
    "${spot[@]}" "${CREATE_OPTIONS[@]}"
}

start() {
  local found
  need_command
  make_bundle FOLDER
  if $DRY_RUN; then
    printf '# if there is no such TPU VM:\n'
    create
  else
    found=$(describe look)
    case $found in
      READY) ;;
      ABSENT) create ;;
      *) fail "TPU VM $RUN_NAME is $found: delete it, wait, or let launch/babysit.sh do it" ;;
    esac
  fi
  clear_result
  tpu scp "$BUNDLE" "$WORKER" "$RUN_NAME:" --worker=all
  worker start
}

state() {
  local found code
  if code=$(read_result); then printf 'done %s\n' "$code"; return; fi
  found=$(describe look) || found=unknown
  case $found in
    READY) if worker status >/dev/null 2>&1; then echo running; else echo idle; fi ;;
    ABSENT) echo absent ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING) echo waiting ;;
    unknown) echo unknown ;;
    *) echo lost ;;
  esac
}

read_options 'start status logs stop delete state' "$@"
need ZONE
need_number MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER
export FOLDER=detailflow/$RUN_NAME # On the hosts, in the home folder.

case $ACTION in
  start) start ;;
  status) tpu describe "$RUN_NAME"; worker status ;;
  logs)
    tpu ssh "$RUN_NAME" --worker="$LOG_WORKER" --command="tail -n 200 -F $FOLDER/log"
    ;;
  stop) worker stop ;;
  delete) tpu delete "$RUN_NAME" --quiet ;;
  state) state ;;
esac
