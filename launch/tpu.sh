# shellcheck shell=bash disable=SC2034,SC2153  # What is set here is for those who source it.
# Shared by tpu_vm.sh, queued_resources.sh and babysit.sh, which source it after common.sh: calls of
# gcloud, what goes to the hosts, and how the run ended. The first two set GROUP, STATE_FIELD,
# FOLDER (on the hosts), SCRIPT (launch/worker.sh there), CODE (in the bucket), AS_ROOT, ALL_NODES
# and DELETE_OPTIONS, define `start` and `word_of`, and call `act`.

readonly TPU_USES="RUN_NAME RUNS ENVIRONMENT PROJECT ZONE TPU_TYPE TPU_VERSION SPOT CREATE_OPTIONS
INSTALL PREPARE MAX_RESTARTS MAX_FAILURES GRACE_SECONDS LOG_WORKER"

# What `act` does besides `start`.
readonly TPU_ACTIONS='start status logs stop delete state'

tpu() { run gcloud compute tpus "$GROUP" "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }

# worker ACTION: launch/worker.sh ACTION on every host.
worker() {
  tpu ssh "$RUN_NAME" "${ALL_NODES[@]}" --worker=all --command="${AS_ROOT}bash $SCRIPT $1"
}

act() {
  local tail="tail -n 200 -F $FOLDER/log"
  case $ACTION in
    start) start ;;
    status) tpu describe "$RUN_NAME"; worker status ;;
    logs) tpu ssh "$RUN_NAME" --worker="$LOG_WORKER" --command="$AS_ROOT$tail" ;;
    stop) worker stop ;;
    delete) tpu delete "$RUN_NAME" "${DELETE_OPTIONS[@]}" --quiet ;;
    state) state ;;
  esac
}

# One word for scripts; `word_of` translates the state that gcloud reports.
state() {
  local found code
  if code=$(read_result); then printf 'done %s\n' "$code"; return; fi
  found=$(look) || found=unknown
  case $found in
    ABSENT) echo absent ;;
    unknown) echo unknown ;;
    *) word_of "$found" ;;
  esac
}

# The state of the TPUs as gcloud reports it, or ABSENT. Where gcloud fails, so does this, with its
# words.
look() {
  local answer errors failed=false
  errors=$(mktemp)
  answer=$(DRY_RUN=false tpu describe "$RUN_NAME" --format="value($STATE_FIELD)" 2>"$errors") ||
    failed=true
  if ! $failed; then
    printf '%s' "${answer:-ABSENT}"
  elif grep -qi -e NOT_FOUND -e 'was not found' "$errors"; then
    failed=false
    printf ABSENT
  else
    cat "$errors" >&2
  fi
  rm -f "$errors"
  ! $failed
}

# create NAME OPTIONS ...: asks for the TPUs.
create() {
  local spot=()
  [[ $SPOT != true ]] || spot=(--spot)
  tpu create "$RUN_NAME" "$@" "${spot[@]}" "${CREATE_OPTIONS[@]}"
}

# ------------------------------------------------------------- what the hosts get, how the run ended

# launch_path NAME: where NAME is kept beside the run; empty without a bucket.
launch_path() {
  if [[ $RUNS == gs://* ]]; then printf '%s/%s.launch/%s' "$RUNS" "$RUN_NAME" "$1"; fi
}

# Makes what goes to the hosts: BUNDLE, the code as it is here, and WORKER, what to do with it.
make_bundle() {
  local folder=$ROOT/build/launch pack script
  BUNDLE=$folder/$RUN_NAME.tar.gz
  WORKER=$folder/$RUN_NAME.worker.sh
  RESULT=$(launch_path exit_code)
  git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1 ||
    fail "$ROOT is not a git checkout: git lists the files to send"
  # shellcheck disable=SC2016  # The words are for sh.
  pack='cd "$1" && git ls-files -z -c -o --exclude-standard | tar --null -T - -czf "$2"'
  pack+=' --ignore-failed-read' # Of a file that was deleted since.
  run mkdir -p "$folder"
  run sh -c "$pack" pack "$ROOT" "$BUNDLE"
  script=$(
    printf '#!/usr/bin/env bash\n'
    declare_settings RUN_NAME PREPARE INSTALL MAX_RESTARTS MAX_FAILURES GRACE_SECONDS RESULT \
      FOLDER CODE ENVIRONMENT COMMAND
    sed 1d "$ROOT/launch/worker.sh"
  )
  if $DRY_RUN; then
    printf "cat >%s <<'END_OF_FILE'\n%s\nEND_OF_FILE\n" "$(quote "$WORKER")" "$script"
  else
    printf '%s\n' "$script" >"$WORKER"
  fi
}

# The exit code that the run ended with for good; fails where it did not end.
read_result() {
  local path
  path=$(launch_path exit_code)
  [[ -n $path ]] && gcloud storage cat "$path" 2>/dev/null
}

clear_result() {
  local path
  path=$(launch_path exit_code)
  [[ -n $path ]] || return 0
  if $DRY_RUN || read_result >/dev/null; then run gcloud storage rm --quiet "$path"; fi
}
