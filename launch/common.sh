# shellcheck shell=bash disable=SC2034  # What is set here is for those who source it.
# Shared by the launchers, which source it: options and settings, dry runs, quoting.
# A launcher sets USAGE and USES (the settings it reads), then calls `read_options "$@"`.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCHER=launch/$(basename -- "$0")
readonly ROOT LAUNCHER
readonly PREEMPTED=143 # detailflow_jax.train.PREEMPTED: SIGTERM came, the state is saved.
readonly SETTINGS_EXAMPLE=$ROOT/launch/settings.sh.example
readonly NAME_PATTERN='^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$' # What GKE, Slurm and TPU VMs all take.

DRY_RUN=false
ACTION=
COMMAND=()

fail() {
  printf '%s: %s (see --help)\n' "$LAUNCHER" "$1" >&2
  exit 2
}

say() { printf '%s: %s\n' "$LAUNCHER" "$1" >&2; }

# The words of a command as one line that a shell reads back to the same words.
quote() {
  local word escaped words=()
  for word; do
    printf -v escaped %q "$word"
    word=${word@Q} # Always in quotes; the shorter form reads better.
    if ((${#escaped} < ${#word})); then word=$escaped; fi
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Runs a command; in a dry run prints it.
run() {
  if $DRY_RUN; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# As `run`, with the text $1 as standard input.
run_with_input() {
  local text=$1
  shift
  if $DRY_RUN; then
    printf "%s <<'END_OF_INPUT'\n%s\nEND_OF_INPUT\n" "$(quote "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

# ------------------------------------------------------------------------------------- the options

# read_options ACTIONS ARGUMENT ...: sets ACTION, COMMAND, DRY_RUN and the settings.
read_options() {
  local actions=$1 settings=
  shift
  [[ ${1:-} != --help ]] || { print_help; exit 0; }
  if [[ -n $actions ]]; then
    [[ " $actions " == *" ${1:-} "* && -n ${1:-} ]] ||
      fail "expected one of: $actions; got '${1:-}'"
    ACTION=$1
    shift
  fi
  settings=$(find_option --settings "$@")
  load_settings "$settings"
  read_flags "$@"
  [[ -n $RUN_NAME ]] || fail 'RUN_NAME is not set: set it in launch/settings.sh or by --run-name'
  [[ $RUN_NAME =~ $NAME_PATTERN ]] ||
    fail "run name '$RUN_NAME': expected at most 40 of a-z, 0-9 and -, a letter first"
  check_values
  # First, so that one that the user sets counts.
  ENVIRONMENT=("DETAILFLOW_GRACE_SECONDS=$GRACE_SECONDS" "${ENVIRONMENT[@]}")
}

# A bucket takes gs://b//x for another place than gs://b/x.
tidy_runs() { while [[ $RUNS == ?*/ && $RUNS != *:// ]]; do RUNS=${RUNS%/}; done; }

# What every launcher can tell of the settings that several have, wherever they were set.
check_values() {
  local setting
  tidy_runs
  [[ ! $RUNS =~ ^[A-Za-z0-9]+: || $RUNS =~ ^gs://[^/] ]] ||
    fail "RUNS is '$RUNS': expected gs://BUCKET/PATH, or a path that all hosts share"
  [[ $SPOT == true || $SPOT == false ]] || fail "$(flag_of SPOT) '$SPOT': expected true or false"
  for setting in "${ENVIRONMENT[@]}"; do
    [[ $setting =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] ||
      fail "$(flag_of ENVIRONMENT) $setting: expected NAME=VALUE"
  done
}

read_flags() {
  local name list
  while (($#)); do
    case $1 in
      --help) print_help; exit 0 ;;
      --dry-run) DRY_RUN=true; shift; continue ;;
      --) shift; COMMAND=("$@"); return ;;
      --config | --config=* | --config.* | --workdir | --workdir=*) train_command "$@"; return ;;
    esac
    (($# > 1)) || fail "unknown option $1, or it needs a value"
    case $1 in
      --settings) shift 2; continue ;;
      --env) name=ENVIRONMENT ;;
      --create-option) name=CREATE_OPTIONS ;;
      *) name=${1#--} name=${name//-/_} name=${name^^} ;;
    esac
    if [[ $1 != --[a-z]* ]] || ! is_setting "$name"; then fail "unknown option $1"; fi
    [[ " ${USES//$'\n'/ } " == *" $name "* ]] || fail "$1 has no effect: $LAUNCHER does not use it"
    case $name in
      ENVIRONMENT | CREATE_OPTIONS) declare -n list=$name; list+=("$2"); unset -n list ;;
      *) printf -v "$name" %s "$2" ;;
    esac
    shift 2
  done
}

# The training options as a command; the run's name makes the workdir, so that it resumes, and the
# folder of compiled programs, so that a restart need not compile again.
train_command() {
  COMMAND=(python -m detailflow_jax.train "$@")
  local option
  tidy_runs
  if [[ -n $RUNS && " ${ENVIRONMENT[*]} " != *" JAX_COMPILATION_CACHE_DIR="* ]]; then
    ENVIRONMENT+=("JAX_COMPILATION_CACHE_DIR=$RUNS/$RUN_NAME.launch/compiled")
  fi
  for option; do
    [[ $option != --workdir && $option != --workdir=* ]] || return 0
  done
  need RUNS
  COMMAND+=(--workdir "$RUNS/$RUN_NAME")
}

find_option() {
  local wanted=$1
  shift
  while (($#)) && [[ $1 != -- && $1 != --config* && $1 != --workdir* ]]; do
    [[ $1 != "$wanted" ]] || { printf '%s' "${2:-}"; return; }
    shift
  done
}

# ------------------------------------------------------------------------------------ the settings

load_settings() {
  local file=${1:-$ROOT/launch/settings.sh} name
  # shellcheck source=launch/settings.sh.example
  source "$SETTINGS_EXAMPLE" # It holds the defaults.
  if [[ ! -f $file ]]; then
    [[ -z ${1:-} ]] || fail "no settings in $file"
    return 0
  fi
  while read -r name; do
    is_setting "$name" || fail "$file sets $name, which no launcher knows"
  done < <(sed -En 's/^([A-Za-z_][A-Za-z_0-9]*)\+?=.*/\1/p' "$file")
  # shellcheck disable=SC1090
  source "$file"
}

is_setting() { grep -q "^$1=" "$SETTINGS_EXAMPLE"; }

need() {
  local name
  for name; do
    [[ -n ${!name} ]] ||
      fail "$name is not set: set it in launch/settings.sh or by $(flag_of "$name")"
  done
}

need_number() {
  local name
  for name; do
    # To bash, 08 is a wrong octal number.
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$(flag_of "$name") '${!name}': expected a number"
  done
}

need_some() {
  local name
  need_number "$@"
  for name; do ((${!name})) || fail "$(flag_of "$name") 0: expected at least 1"; done
}

need_command() { ((${#COMMAND[@]})) || fail 'nothing to run: give training options or -- COMMAND'; }

flag_of() {
  local name=${1,,}
  case $1 in
    ENVIRONMENT) printf -- '--env' ;;
    CREATE_OPTIONS) printf -- '--create-option' ;;
    *) printf -- '--%s' "${name//_/-}" ;;
  esac
}

print_help() {
  local name
  printf '%s\n\n' "$USAGE"
  printf '  %-18s %s\n' --dry-run 'print what would run, and leave' \
    --settings 'FILE of settings (default: launch/settings.sh)' --help 'this text'
  printf '\nsettings, each also a flag with a value:\n'
  for name in $USES; do
    printf '  %-18s %s\n' "$(flag_of "$name")" \
      "$(sed -n "s/^$name=.*[[:space:]]# //p" "$SETTINGS_EXAMPLE")"
  done
}

# The settings and arrays named, as shell code that sets them again.
declare_settings() {
  local name words
  for name; do
    if [[ $name == ENVIRONMENT || $name == COMMAND ]]; then
      declare -n words=$name
      printf '%s=(%s)\n' "$name" "$(quote "${words[@]}")"
      unset -n words
    else
      printf '%s=%s\n' "$name" "${!name@Q}"
    fi
  done
}

# ----------------------------------------------------------------------------------- Kubernetes

# Follows the log of host LOG_WORKER of the first slice.
pod_log() {
  local pod="jobset.sigs.k8s.io/jobset-name=$RUN_NAME,jobset.sigs.k8s.io/job-index=0"
  pod+=",batch.kubernetes.io/job-completion-index=$LOG_WORKER"
  run kubectl --namespace="$NAMESPACE" logs --follow --tail=200 --selector="$pod"
}
