#!/usr/bin/env bash
# Runs a command on the GPUs of a Slurm cluster, one process per GPU.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

export USES="RUN_NAME RUNS ENVIRONMENT NODES GPUS_PER_NODE TIME_LIMIT CREATE_OPTIONS VENV PREPARE
MAX_RESTARTS MAX_FAILURES GRACE_SECONDS"
export USAGE="\
usage: launch/slurm.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     submit a job that runs \`detailflow train TRAINING-OPTIONS\`, or COMMAND, once per GPU;
            queued again when it leaves preempted, or its time is over
  status    the job in the queue
  logs      follow the log
  stop      let the run save and leave; it is not queued again

RUNS is a path that all nodes share, and so is the folder of this code.

example: launch/slurm.sh start --run-name gpt-l --nodes 4 --create-option --partition=gpu \\
           --config configs/generator.py:detailflow_16"

start() {
  local script time=()
  need_command
  VENV=${VENV:-$ROOT/.venv}
  [[ -z $TIME_LIMIT ]] || time=(--time="$TIME_LIMIT")
  script=$(
    printf '#!/usr/bin/env bash\n'
    declare_settings ROOT VENV PREPARE MAX_RESTARTS MAX_FAILURES GRACE_SECONDS STOP_FILE \
      ENVIRONMENT COMMAND
    sed 1d "$ROOT/launch/slurm_job.sh"
  )
  run mkdir -p "$FOLDER"
  run rm -f "$STOP_FILE"
  # The tasks get SIGTERM GRACE_SECONDS before the time is over.
  run_with_input "$script" sbatch --job-name="$RUN_NAME" --nodes="$NODES" \
    --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE" --requeue \
    --open-mode=append --output="$LOG" --signal="TERM@$GRACE_SECONDS" \
    "${time[@]}" "${CREATE_OPTIONS[@]}"
}

# A job that waits has nothing to save; to one that runs, SIGTERM goes without a deadline.
stop() {
  run touch "$STOP_FILE"
  run scancel --jobname="$RUN_NAME" --user="$USER" --state=PENDING
  run scancel --jobname="$RUN_NAME" --user="$USER" --state=RUNNING --signal=TERM
}

read_options 'start status logs stop' "$@"
need_some NODES GPUS_PER_NODE
need_number MAX_RESTARTS MAX_FAILURES GRACE_SECONDS
need RUNS
[[ $RUNS != gs://* ]] || fail "RUNS is '$RUNS': expected a path that all nodes share"
FOLDER=$RUNS/$RUN_NAME.launch
LOG=$FOLDER/log
STOP_FILE=$FOLDER/stop
USER=${USER:-$(id -un)}

case $ACTION in
  start) start ;;
  status) run squeue --name="$RUN_NAME" --user="$USER" ;;
  logs) run tail -n 200 -F "$LOG" ;;
  stop) stop ;;
esac
