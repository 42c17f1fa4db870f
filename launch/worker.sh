#!/usr/bin/env bash
# What a host of a TPU pod does. tpu_vm.sh and queued_resources.sh put the settings above this text
# and send it along with the code:
#   start    unpack and install the code, then run the command behind this shell
#   boot     as a start-up script: fetch the code first, and run the command in front
#   stop     let the command save and leave
#   status   tell whether it runs; fails where it does not
set -euo pipefail

: "${RUN_NAME:?}" "${INSTALL:?}" "${MAX_RESTARTS:?}" "${MAX_FAILURES:?}" "${GRACE_SECONDS:?}"
: "${FOLDER:?}" "${PREPARE=}" "${RESULT=}" "${CODE=}" "${COMMAND[0]:?}" "${ENVIRONMENT[*]-}"
export HOME=${HOME:-/root} # A start-up script has none.
[[ $FOLDER == /* ]] || FOLDER=$HOME/$FOLDER
readonly FOLDER

say() { printf '%s: %s\n' "$(hostname)" "$1"; }

# A number left from before the host was restarted may be another process's now.
running() { [[ -s $FOLDER/pid ]] && grep -qs launch/local.sh "/proc/$(<"$FOLDER/pid")/cmdline"; }

install_code() {
  say "installing $RUN_NAME"
  mkdir -p "$FOLDER/code"
  # The environment stays, so that the next start is quick; files deleted since must not.
  find "$FOLDER/code" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf "$1" -C "$FOLDER/code"
  cd "$FOLDER/code"
  eval "$INSTALL"
  eval "$PREPARE"
}

run_command() {
  local code=0
  cd "$FOLDER/code"
  ((${#ENVIRONMENT[@]} == 0)) || export "${ENVIRONMENT[@]}"
  launch/local.sh --max-restarts "$MAX_RESTARTS" --max-failures "$MAX_FAILURES" \
    -- "${COMMAND[@]}" &
  printf '%s\n' $! >"$FOLDER/pid" # `stop` tells the loop, which tells the command.
  wait $! || code=$?
  say "the command left with $code"
  printf '%s\n' "$code" >"$FOLDER/exit_code"
  # 143 is no end: it was told to stop, and will be started again.
  if [[ $code != 143 && -n $RESULT && $(worker_number) == 0 ]]; then
    printf '%s\n' "$code" | gcloud storage cp - "$RESULT"
  fi
  return "$code"
}

worker_number() {
  local from=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  curl -sf --retry 3 -H 'Metadata-Flavor: Google' "$from/agent-worker-number" || printf 0
}

start() {
  ! running || { say "$RUN_NAME runs already: stop it first"; exit 1; }
  install_code "$HOME/$RUN_NAME.tar.gz"
  rm -f "$FOLDER/exit_code"
  nohup setsid bash "$HOME/$RUN_NAME.worker.sh" run >>"$FOLDER/log" 2>&1 </dev/null &
  say "started $RUN_NAME"
}

boot() {
  mkdir -p "$FOLDER"
  exec > >(tee -a "$FOLDER/log") 2>&1
  if gcloud storage cat "$RESULT" 2>/dev/null; then
    say "$RUN_NAME has ended already" # A host that starts anew after the end has nothing to do.
    return
  fi
  cp "$0" "$FOLDER/worker.sh"
  gcloud storage cp "$CODE" "$FOLDER/code.tar.gz"
  install_code "$FOLDER/code.tar.gz"
  run_command
}

stop() {
  running || { say "$RUN_NAME does not run"; return; }
  local pid end=$((SECONDS + GRACE_SECONDS))
  pid=$(<"$FOLDER/pid")
  kill -TERM "$pid"
  while running; do
    if ((SECONDS >= end)); then
      say "$RUN_NAME did not leave in $GRACE_SECONDS s: killed"
      pkill -KILL -P "$pid" || true
      kill -KILL "$pid" || true
      return
    fi
    sleep 0.5 || true
  done
  say "$RUN_NAME left with $(cat "$FOLDER/exit_code" 2>/dev/null)"
}

status() {
  if running; then
    say "$RUN_NAME runs"
  else
    say "$RUN_NAME does not run; it left with $(cat "$FOLDER/exit_code" 2>/dev/null || echo nothing)"
    return 1
  fi
}

case ${1:-boot} in # A start-up script gets no argument.
  start) start ;;
  boot) boot ;;
  run) run_command ;;
  stop) stop ;;
  status) status ;;
  *) printf 'unknown action %s\n' "$1" >&2; exit 2 ;;
esac
