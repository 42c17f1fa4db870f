#!/usr/bin/env bash
# Keeps a run on a TPU pod alive until it ends: looks, deletes what was lost, asks again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/tpu.sh
source "$ROOT/launch/tpu.sh"

export USES="$TPU_USES POLL_SECONDS"
export USAGE="\
usage: launch/babysit.sh [--with LAUNCHER] [--keep] [LAUNCHER's options] TRAINING-OPTIONS
       launch/babysit.sh [--with LAUNCHER] [--keep] [LAUNCHER's options] -- COMMAND [ARGUMENT ...]

Starts the run where it does not run, deletes TPUs that were reclaimed or failed and asks for them
again, all under one run name, so that the run resumes. Leaves with the run's own exit code when it
has ended, and deletes the TPUs then. RUNS must be in a bucket (gs://), which tells of the end.

  --with LAUNCHER    queued_resources (default) or tpu_vm
  --keep             do not delete the TPUs when the run has ended

Ctrl-C ends the babysitter alone: stop the run with the launcher's own \`stop\`.

example: launch/babysit.sh --run-name gpt-l --spot true --config configs/generator.py:detailflow_16"

with=queued_resources
keep=false
while true; do
  case ${1:-} in
    --with)
      with=${2:-}
      [[ $with == queued_resources || $with == tpu_vm ]] ||
        fail "--with '$with': expected queued_resources or tpu_vm"
      shift 2
      ;;
    --keep) keep=true; shift ;;
    *) break ;;
  esac
done
[[ $with == tpu_vm ]] || USES+=' NUM_SLICES'
read_options '' "$@"
arguments=()
while (($#)) && [[ $1 != -- && $1 != --config* && $1 != --workdir* ]]; do
  if [[ $1 == --poll-seconds ]]; then shift; else arguments+=("$1"); fi # Of this launcher alone.
  shift
done
arguments+=("$@")
need_command
need_number MAX_RESTARTS
need_some POLL_SECONDS
[[ $RUNS == gs://* ]] || fail "RUNS is '$RUNS': expected gs://BUCKET/PATH"

launcher() { "$ROOT/launch/$with.sh" "$1" "${arguments[@]}"; }

tell() { say "$(date '+%F %T') $RUN_NAME: $1"; }

try() { launcher "$1" || tell "$1 failed; trying again in $POLL_SECONDS s"; }

starts=0
start() {
  ((starts++ <= MAX_RESTARTS)) || { tell "gave up after $MAX_RESTARTS restarts"; exit 1; }
  try start
}

finish() {
  tell "ended with $1"
  $keep || launcher delete || tell 'the TPUs could not be deleted: delete them by hand'
  exit "$1"
}

if $DRY_RUN; then
  printf '# every %s s:\n%s\n' "$POLL_SECONDS" \
    "$(quote "$ROOT/launch/$with.sh" state "${arguments[@]}" | sed 's/ --dry-run//')"
  printf '# absent: start. idle: stop, start. lost: delete, start. done: delete, leave. start is:\n'
  launcher start
  printf '# delete is:\n'
  launcher delete
  exit
fi

previous=
while true; do
  state=$(launcher state) || state=unknown
  [[ $state == "$previous" ]] || tell "$state"
  case $state in
    'done '*)
      # What an earlier babysitter saw fail is tried again, what had finished is not.
      if [[ $previous != done* && -n $previous || $state == 'done 0' ]]; then
        finish "${state#done }"
      fi
      start
      ;;
    absent) start ;;
    idle) try stop; start ;;
    lost) try delete; start ;;
  esac
  previous=$state
  sleep "$POLL_SECONDS"
done
