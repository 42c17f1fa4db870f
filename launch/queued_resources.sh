#!/usr/bin/env bash
# Asks for TPU pods, and runs a command on all their hosts whenever they start.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

export USES="RUN_NAME RUNS ENVIRONMENT PROJECT ZONE TPU_TYPE NUM_SLICES TPU_VERSION SPOT
CREATE_OPTIONS INSTALL PREPARE MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER"
export USAGE="\
usage: launch/queued_resources.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     put this code into the bucket and queue for the TPUs; their hosts install it when they
            start, and run python -m detailflow_jax.train TRAINING-OPTIONS, or COMMAND; they run
            it again when it leaves preempted, and when they are restarted
  status    the state of the request, and of the command on every host
  logs      follow the log of one host
  stop      let the run save and leave; the TPUs stay, and cost
  delete    give the TPUs back
  state     one word for scripts: absent, waiting, running, lost, unknown; or: done CODE

RUNS must be in a bucket (gs://). TPUs that were reclaimed stay in the list until they are deleted:
launch/babysit.sh does that, and asks again.

example: launch/queued_resources.sh start --run-name gpt-l --config configs/generator.py:detailflow_16"

queue() {
  run gcloud compute tpus queued-resources "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

# worker ACTION: launch/worker.sh ACTION on every host; it runs as root there.
worker() {
  queue ssh "$RUN_NAME" --node=all --worker=all --command="sudo bash $FOLDER/worker.sh $1"
}

look() { DRY_RUN=false queue describe "$RUN_NAME" --format='value(state.state)'; }

start() {
  need_command
  need TPU_TYPE TPU_VERSION
  local spot=() nodes=(--node-id="$RUN_NAME")
  [[ $SPOT != true ]] || spot=(--spot)
  ((NUM_SLICES == 1)) || nodes=(--node-count="$NUM_SLICES" --node-prefix="$RUN_NAME")
  make_bundle FOLDER CODE
  run gcloud storage cp "$BUNDLE" "$CODE"
  clear_result
  queue create "$RUN_NAME" "${nodes[@]}" --accelerator-type="$TPU_TYPE" \
    --runtime-version="$TPU_VERSION" --metadata-from-file="startup-script=$WORKER" \
    "${spot[@]}" "${CREATE_OPTIONS[@]}"
}

state() {
  local found code
  if code=$(read_result); then printf 'done %s\n' "$code"; return; fi
  found=$(describe look) || found=unknown
  case $found in
    ACTIVE) echo running ;;
    ABSENT) echo absent ;;
    SUSPENDED | SUSPENDING | FAILED) echo lost ;;
    unknown) echo unknown ;;
    *) echo waiting ;;
  esac
}

read_options 'start status logs stop delete state' "$@"
need ZONE
[[ $RUNS == gs://* ]] || fail "RUNS is '$RUNS': expected gs://BUCKET/PATH"
need_number NUM_SLICES MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER
export FOLDER=/opt/detailflow/$RUN_NAME
CODE=$(launch_path code.tar.gz)
export CODE

case $ACTION in
  start) start ;;
  status) queue describe "$RUN_NAME"; worker status ;;
  logs)
    queue ssh "$RUN_NAME" --worker="$LOG_WORKER" --command="sudo tail -n 200 -F $FOLDER/log"
    ;;
  stop) worker stop ;;
  delete) queue delete "$RUN_NAME" --force --quiet ;;
  state) state ;;
esac
