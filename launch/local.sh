#!/usr/bin/env bash
# Runs a command on this machine, as one process or several, and starts it again while it leaves
# preempted.
set -euo pipefail

# Started behind a script (`launch/local.sh ... &`), a shell ignores SIGINT and cannot trap it, nor
# can what it starts be interrupted. So it begins again with the signal's default.
if [[ $(trap -p INT) == "trap -- '' SIGINT" ]]; then
  restore='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)'
  exec "$(command -v python3 || command -v python)" -c \
    "$restore; os.execvp('bash', ['bash', *sys.argv[1:]])" "${BASH_SOURCE[0]}" "$@"
fi

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# Seconds that the others get when one process failed: they may hang for it.
readonly KILL_AFTER=${DETAILFLOW_KILL_SECONDS:-10}
readonly USAGE="\
usage: launch/local.sh [options] TRAINING-OPTIONS
       launch/local.sh [options] -- COMMAND [ARGUMENT ...]

Trains (\`detailflow train TRAINING-OPTIONS\`) or runs COMMAND on this machine, and starts it again
while it leaves with $PREEMPTED: preempted, its state saved.

  -n N                run N processes that form one computation, joined over loopback; each line of
                      output begins with the number of its process
  --log-dir DIR       append the output of process I to DIR/process_I.log instead (with -n)
  --grace SECONDS     how long processes may go on after one left preempted (default: 300; with -n)
  --venv DIR          virtual environment to activate (default: .venv of this repository, if any)
  --cpu-devices N     let JAX see N devices on the CPU, in each process, to try a mesh
  --max-restarts N    give up after N restarts (default: 1000)
  --max-failures N    start again after another failure too, N times (default: 0)
  --dry-run           print what would run, and leave
  --help              this text

example: launch/local.sh --config configs/tokenizer.py:digits --workdir runs/tok
         launch/local.sh -n 2 --cpu-devices 4 --config configs/tokenizer.py:digits --workdir runs/tok
Ctrl-C or SIGTERM reaches the command, which saves and leaves; it is then not started again.

exit code: the command's. Of several processes, that of the first that failed, after which the
others are stopped; $PREEMPTED only if all left preempted; 2 if any left with it. 2 is a wrong
command line, here or of the command, and is never started again."

processes=
log_dir=
grace=
venv="$ROOT/.venv"
cpu_devices=
max_restarts=1000
max_failures=0

parse() {
  local name
  while (($#)); do
    case $1 in
      --help) printf '%s\n' "$USAGE"; exit 0 ;;
      --dry-run) DRY_RUN=true; shift; continue ;;
      --) shift; COMMAND=("$@"); break ;;
      --config | --config=* | --workdir | --workdir=* | --config.*)
        COMMAND=(python -m detailflow_jax.train "$@"); break ;;
    esac
    (($# > 1)) || fail "unknown option $1, or it needs a value"
    name=${1#--} name=${name//-/_}
    case $1 in
      -n) name=processes ;&
      --cpu-devices) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: expected a number, at least 1" ;;
      --grace | --max-restarts | --max-failures) [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || fail "$1 $2: expected a number" ;;
      --venv) [[ -f $2/bin/activate ]] || fail "no virtual environment in $2" ;;
      --log-dir) ;;
      *) fail "unknown option $1" ;;
    esac
    printf -v "$name" %s "$2"
    shift 2
  done
  if [[ -z $processes ]]; then
    [[ -z $log_dir ]] || fail '--log-dir has no effect without -n'
    [[ -z $grace ]] || fail '--grace has no effect without -n'
  fi
  grace=${grace:-300}
  need_command
}

# The shell commands that come before the command.
set_up() {
  local flags
  [[ ! -f $venv/bin/activate ]] || printf 'source %s\n' "$(quote "$venv/bin/activate")"
  if [[ -z ${JAX_COMPILATION_CACHE_DIR:-} && -n ${HOME:-} ]]; then # For restarts.
    # Of this host: another one's CPU may lack an instruction.
    printf 'export JAX_COMPILATION_CACHE_DIR=%s\n' \
      "$(quote "$HOME/.cache/detailflow_jax/compiled/$(uname -n)")"
  fi
  if [[ -n $cpu_devices ]]; then
    flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$cpu_devices"
    printf 'export JAX_PLATFORMS=cpu XLA_FLAGS=%s\n' "$(quote "$flags")"
  fi
}

# The words that make the command process $1 of all, meeting at port $2; detailflow_jax.runtime.distributed
# reads them. Nobody from outside can join.
place() {
  printf '%s\n' env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" \
    "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1"
}

print_plan() {
  local i words
  set_up
  for ((i = 0; i < ${processes:-1}; i++)); do
    words=()
    [[ -z $processes ]] || mapfile -t words < <(place "$i" PORT)
    printf '%s\n' "$(quote "${words[@]}" "${COMMAND[@]}")${processes:+ &}"
  done
}

# ------------------------------------------------------------------------------------- one process

stopping=false
pids=()
groups=()
stop() {
  stopping=true
  ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true
}

# Sets `code` to what the command left with.
run_one() {
  # A shell lets what it puts behind itself ignore SIGINT: Ctrl-C would not reach the command.
  (trap - INT; exec "${COMMAND[@]}") &
  pids=($!)
  code=0
  # A trapped signal ends `wait` early: go on until the command itself is gone.
  while wait "${pids[0]}" && code=0 || code=$?; kill -0 "${pids[0]}" 2>/dev/null; do :; done
}

# ------------------------------------------------------------------------------- several processes

free_port() {
  local python
  python=$(command -v python || command -v python3) || fail 'no python to find a free port with'
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_process() {
  local words
  mapfile -t words < <(place "$1" "$2")
  set -m # A process group each, so that nothing it started outlives it.
  if [[ -n $log_dir ]]; then
    "${words[@]}" "${COMMAND[@]}" >>"$log_dir/process_$1.log" 2>&1 </dev/null &
  else
    "${words[@]}" "${COMMAND[@]}" >"$scratch/$1" 2>&1 </dev/null &
  fi
  pids[$1]=$!
  groups+=($!)
  set +m
}

# Passes the output of process $1 on, line by line; it ends with the process, not by a signal.
start_writer() {
  mkfifo "$scratch/$1"
  (
    trap '' INT TERM
    exec sed -u "s/^/[$1] /" <"$scratch/$1"
  ) &
  writers+=($!)
}

# Process $1 left with $2: tells the others what follows for them.
left_with() {
  # Who waits for a process that leaves with 2 may be gone before it.
  if (($2 == 2)) && [[ -n $failed ]]; then failed=2; fi
  if (($2 == 0)) || [[ -n $failed ]]; then return; fi
  if (($2 == PREEMPTED)); then
    # The others agreed to leave as well, or were not told: then they would wait for ever.
    deadline=${deadline:-$((SECONDS + grace))}
    return
  fi
  failed=$2
  deadline=$((SECONDS + KILL_AFTER))
  if ((${#pids[@]})); then
    say "process $1 left with $2: stopping the others"
    kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
}

# Whatever ends this shell, no process stays behind.
clean_up() {
  local pid
  for pid in "${groups[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  rm -rf "$scratch"
}

# Sets `code` to that of the first process that failed, or 2; PREEMPTED where all left so.
run_several() {
  local i port failed='' deadline='' zeros=0 writers=()
  port=$(free_port)
  groups=()
  for ((i = 0; i < processes; i++)); do
    [[ -n $log_dir ]] || start_writer "$i"
    start_process "$i" "$port"
  done
  while ((${#pids[@]})); do
    sleep 0.1 || true # Ctrl-C ends it too.
    for i in "${!pids[@]}"; do
      if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      code=0
      wait "${pids[i]}" || code=$?
      unset "pids[$i]"
      ((code)) || zeros=$((zeros + 1))
      left_with "$i" "$code"
    done
    if [[ -n $deadline ]] && ((SECONDS > deadline && ${#pids[@]})); then
      say "process(es) ${!pids[*]} did not leave: killed"
      kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
  done
  for i in "${groups[@]}"; do kill -KILL -- "-$i" 2>/dev/null || true; done
  ((${#writers[@]} == 0)) || wait "${writers[@]}"
  [[ -n $log_dir ]] || rm -f "$scratch"/*
  code=${failed:-0}
  [[ -z $failed ]] && ((zeros < processes)) || return 0
  code=$PREEMPTED
  ((zeros == 0)) || { say "$zeros of $processes finished, the others left preempted"; code=1; }
}

# ---------------------------------------------------------------------------------------- the loop

parse "$@"
if $DRY_RUN; then
  print_plan
  exit 0
fi
while read -r line; do eval "$line"; done < <(set_up)
trap stop INT TERM
[[ -z $log_dir ]] || mkdir -p "$log_dir" || fail "--log-dir $log_dir: cannot be made"
if [[ -n $processes ]]; then
  scratch=$(mktemp -d)
  trap clean_up EXIT
fi

restarts=0 failures=0
while true; do
  if [[ -n $processes ]]; then run_several; else run_one; fi
  if $stopping; then exit "$code"; fi
  case $code in
    0 | 2 | 130) exit "$code" ;; # Done, or the next time would be no better, or nobody wants it.
    "$PREEMPTED")
      if ((restarts++ >= max_restarts)); then
        say "preempted again after $max_restarts restarts"
        exit "$code"
      fi
      say 'preempted, starting again'
      ;;
    *)
      if ((failures++ >= max_failures)); then exit "$code"; fi
      say "left with $code, starting again"
      sleep $((5 * (failures - 1))) || true
      if $stopping; then exit "$code"; fi
      ;;
  esac
done
