#!/usr/bin/env bash
# The batch script of launch/slurm.sh, which puts the settings above this text: runs the command
# once a GPU, and queues the job again when it leaves preempted.
set -euo pipefail

: "${ROOT:?}" "${VENV=}" "${PREPARE=}" "${MAX_RESTARTS:?}" "${MAX_FAILURES:?}" "${GRACE_SECONDS:?}"
: "${STOP_FILE:?}" "${COMMAND[0]:?}" "${ENVIRONMENT[*]-}"
readonly PREEMPTED=143

cd "$ROOT"
# shellcheck disable=SC1091
[[ ! -f $VENV/bin/activate ]] || source "$VENV/bin/activate"
((${#ENVIRONMENT[@]} == 0)) || export "${ENVIRONMENT[@]}"
eval "$PREPARE"

# Slurm tells the tasks itself; this shell has to stay until they have left.
trap 'echo "$(date): asked to leave"' TERM

run_command() {
  # Tasks that saw the preemption leave one after another: the first must not take the rest along.
  srun --kill-on-bad-exit=0 --wait="$GRACE_SECONDS" "${COMMAND[@]}" &
  code=0
  while wait $! && code=0 || code=$?; kill -0 $! 2>/dev/null; do :; done
}

for ((failures = 0; ; failures++)); do
  run_command
  echo "$(date): the command left with $code"
  case $code in
    0 | 2 | 130 | "$PREEMPTED") break ;;
  esac
  if ((failures >= MAX_FAILURES)); then break; fi
done

if ((code == PREEMPTED)) && [[ ! -e $STOP_FILE ]]; then
  if ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  echo "preempted again after $MAX_RESTARTS restarts"
fi
exit "$code"
