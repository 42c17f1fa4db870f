#!/usr/bin/env bash
# Asks for TPU pods, and runs a command on all their hosts whenever they start.
# shellcheck disable=SC2034  # launch/tpu.sh reads them.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/tpu.sh
source "$ROOT/launch/tpu.sh"

export USES="$TPU_USES NUM_SLICES"
export USAGE="\
usage: launch/queued_resources.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     put this code into the bucket and queue for the TPUs; their hosts install it when they
            start, and run \`detailflow train TRAINING-OPTIONS\`, or COMMAND; they run it again when
            it leaves preempted, and when they are restarted
  status    the state of the request, and of the command on every host
  logs      follow the log of one host
  stop      let the run save and leave; the TPUs stay, and cost
  delete    give the TPUs back
  state     one word for scripts: absent, waiting, running, lost, unknown; or: done CODE

RUNS must be in a bucket (gs://). TPUs that were reclaimed stay in the list until they are deleted:
launch/babysit.sh does that, and asks again.

example: launch/queued_resources.sh start --run-name gpt-l --config configs/generator.py:detailflow_16"

start() {
  local nodes=(--node-id="$RUN_NAME")
  need_command
  need TPU_TYPE TPU_VERSION
  ((NUM_SLICES == 1)) || nodes=(--node-count="$NUM_SLICES" --node-prefix="$RUN_NAME")
  make_bundle
  run gcloud storage cp "$BUNDLE" "$CODE"
  clear_result
  create "${nodes[@]}" --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_VERSION" \
    --metadata-from-file="startup-script=$WORKER"
}

word_of() {
  case $1 in
    ACTIVE) echo running ;;
    SUSPENDED | SUSPENDING | FAILED) echo lost ;;
    *) echo waiting ;;
  esac
}

read_options "$TPU_ACTIONS" "$@"
need ZONE
[[ $RUNS == gs://* ]] || fail "RUNS is '$RUNS': expected gs://BUCKET/PATH"
need_some NUM_SLICES
need_number MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER
CODE=$(launch_path code.tar.gz)
GROUP=queued-resources STATE_FIELD=state.state ALL_NODES=(--node=all) DELETE_OPTIONS=(--force)
AS_ROOT='sudo ' # As a start-up script runs.
FOLDER=/opt/detailflow/$RUN_NAME SCRIPT=$FOLDER/worker.sh
act
