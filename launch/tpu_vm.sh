#!/usr/bin/env bash
# Runs a command on all hosts of a TPU VM, by scp and ssh.
# shellcheck disable=SC2034  # launch/tpu.sh reads them.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/tpu.sh
source "$ROOT/launch/tpu.sh"

export USES=$TPU_USES
export USAGE="\
usage: launch/tpu_vm.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     create the TPU VM where there is none, send it this code, install it, and run
            \`detailflow train TRAINING-OPTIONS\`, or COMMAND, on every host; started again while
            it leaves preempted
  status    the state of the TPU VM, and of the command on every host
  logs      follow the log of one host
  stop      let the run save and leave; the TPU VM stays, and costs
  delete    delete the TPU VM
  state     one word for scripts: absent, waiting, running, idle, lost, unknown; or: done CODE

example: launch/tpu_vm.sh start --run-name gpt-l --config configs/generator.py:detailflow_16"

start() {
  local found=ABSENT
  need_command
  make_bundle
  if $DRY_RUN; then printf '# if there is no such TPU VM:\n'; else found=$(look); fi
  case $found in
    READY) ;;
    ABSENT)
      need TPU_TYPE TPU_VERSION
      create --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION"
      ;;
    *) fail "TPU VM $RUN_NAME is $found: delete it, wait, or let launch/babysit.sh do it" ;;
  esac
  clear_result
  tpu scp "$BUNDLE" "$WORKER" "$RUN_NAME:" --worker=all
  worker start
}

word_of() {
  case $1 in
    READY) if worker status >/dev/null 2>&1; then echo running; else echo idle; fi ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING) echo waiting ;;
    *) echo lost ;;
  esac
}

read_options "$TPU_ACTIONS" "$@"
need ZONE
need_number MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER
[[ $NUM_SLICES == 1 ]] || fail "NUM_SLICES is $NUM_SLICES: for several use queued_resources.sh"
GROUP=tpu-vm STATE_FIELD=state ALL_NODES=() DELETE_OPTIONS=() AS_ROOT='' CODE=''
FOLDER=detailflow/$RUN_NAME SCRIPT=$RUN_NAME.worker.sh # On the hosts, in the home folder.
act
