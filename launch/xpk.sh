#!/usr/bin/env bash
# Runs a command on TPU pods of a GKE cluster that XPK made.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

export USES="RUN_NAME RUNS ENVIRONMENT PROJECT ZONE CLUSTER IMAGE TPU_TYPE NUM_SLICES CREATE_OPTIONS
NAMESPACE MAX_RESTARTS GRACE_SECONDS LOG_WORKER"
export USAGE="\
usage: launch/xpk.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     create a workload that runs \`detailflow train TRAINING-OPTIONS\`, or COMMAND, on every
            host, and is started again while it leaves preempted
  status    the state of the workload
  logs      follow the log of one host (kubectl must know the cluster)
  stop      let the run save and leave, and delete the workload

example: launch/xpk.sh start --run-name gpt-l --config configs/generator.py:detailflow_16"

xpk_workload() {
  run xpk workload "$@" --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

start() {
  need_command
  need TPU_TYPE IMAGE
  local setting environment=()
  for setting in "${ENVIRONMENT[@]}"; do environment+=(--env="$setting"); done
  # XPK passes SIGTERM to the shell that runs the command; with `exec` that is the command itself.
  xpk_workload create --workload="$RUN_NAME" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
    --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="$PREEMPTED" \
    --termination-grace-period-seconds="$GRACE_SECONDS" "${environment[@]}" \
    "${CREATE_OPTIONS[@]}" --command="exec $(quote "${COMMAND[@]}")"
}

read_options 'start status logs stop' "$@"
need ZONE CLUSTER
need_some NUM_SLICES
need_number MAX_RESTARTS GRACE_SECONDS LOG_WORKER

case $ACTION in
  start) start ;;
  status) xpk_workload list --filter-by-job="^$RUN_NAME\$" ;;
  logs) pod_log ;;
  stop) xpk_workload delete --workload="$RUN_NAME" --force ;;
esac
