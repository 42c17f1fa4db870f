#!/usr/bin/env bash
# Runs a command on TPU pods of a GKE cluster, as the JobSet of launch/jobset.yaml.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

export USES="RUN_NAME RUNS ENVIRONMENT NAMESPACE IMAGE TPU_TYPE TPU_TOPOLOGY NUM_SLICES SPOT
SERVICE_ACCOUNT QUEUE MAX_FAILURES GRACE_SECONDS LOG_WORKER"
export USAGE="\
usage: launch/jobset.sh ACTION [options] [TRAINING-OPTIONS | -- COMMAND [ARGUMENT ...]]

  start     create a JobSet that runs \`detailflow train TRAINING-OPTIONS\`, or COMMAND, on every
            host; started again whenever it leaves preempted, and MAX_FAILURES times otherwise
  print     print the JobSet alone
  status    the state of the JobSet and its pods
  logs      follow the log of one host
  stop      let the run save and leave, and delete the JobSet

example: launch/jobset.sh start --run-name gpt-l --config configs/generator.py:detailflow_16"

kube() { run kubectl --namespace="$NAMESPACE" "$@"; }

# A text as a JSON string, which YAML reads too. Kubernetes would replace $(NAME).
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//"\$("/"\$\$("}
  [[ $text != *[[:cntrl:]]* ]] || fail "$(quote "$1") holds a control character"
  printf '"%s"' "$text"
}

json_list() {
  local word words=''
  for word; do words+="${words:+, }$(json "$word")"; done
  printf '[%s]' "$words"
}

# Sets ACCELERATOR and TOPOLOGY, which GKE's nodes are labelled with, CHIPS (a host) and HOSTS.
find_tpu() {
  local chips=${TPU_TYPE##*-} side
  case $TPU_TYPE in
    v5litepod-*) ACCELERATOR=tpu-v5-lite-podslice ;;
    v6e-*) ACCELERATOR=tpu-v6e-slice ;;
    v5p-*) ACCELERATOR=tpu-v5p-slice ;;
    v4-*) ACCELERATOR=tpu-v4-podslice ;;
    *) fail "TPU type '$TPU_TYPE': expected v5litepod-N, v6e-N, v5p-N or v4-N" ;;
  esac
  [[ $chips =~ ^[1-9][0-9]*$ ]] || fail "TPU type '$TPU_TYPE': expected a number at the end"
  case $TPU_TYPE in
    v4-* | v5p-*) TOPOLOGY=${TPU_TOPOLOGY:-$(sides $((chips / 2)) 3)} ;; # Named by cores.
    *) TOPOLOGY=${TPU_TOPOLOGY:-$(sides "$chips" 2)} ;;
  esac
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "TPU topology '$TOPOLOGY': expected such as 16x16"
  chips=1
  for side in ${TOPOLOGY//x/ }; do chips=$((chips * side)); done
  CHIPS=$((chips < 4 ? chips : 4))
  [[ $TOPOLOGY != 2x4 ]] || CHIPS=8 # The only host of eight.
  HOSTS=$((chips / CHIPS))
}

# sides CHIPS DIMENSIONS: the sides of a pod of 2^k chips, as even as they get.
sides() {
  local k=0 i topology=
  while ((1 << k < $1)); do k=$((k + 1)); done
  ((1 << k == $1)) || fail "TPU type '$TPU_TYPE': give its --tpu-topology"
  for ((i = 0; i < $2; i++)); do topology+=x$((1 << (k + i) / $2)); done
  topology=${topology#x}
  printf '%s' "${topology/#1x2x2/2x2x1}"
}

# The entries of the container's `env` for what the user set, and the choices of the pod's form.
environment_entries() {
  local setting
  for setting in "${ENVIRONMENT[@]}"; do
    printf '                - {name: %s, value: %s}\n' \
      "$(json "${setting%%=*}")" "$(json "${setting#*=}")"
  done
}

# launch/jobset.yaml with its @WORDS@ filled in.
manifest() {
  local line word text
  declare -A words=(
    [NAME]=$RUN_NAME [NAMESPACE]=$NAMESPACE [SLICES]=$NUM_SLICES [HOSTS]=$HOSTS [CHIPS]=$CHIPS
    [PROCESSES]=$((HOSTS * NUM_SLICES)) [ACCELERATOR]=$ACCELERATOR [TOPOLOGY]=$TOPOLOGY
    [MAX_FAILURES]=$MAX_FAILURES [GRACE_SECONDS]=$GRACE_SECONDS [PREEMPTED]=$PREEMPTED
    [SERVICE_ACCOUNT]=$(json "$SERVICE_ACCOUNT") [IMAGE]=$(json "$IMAGE")
    [COMMAND]=$(json_list "${COMMAND[@]}") [QUEUE]=$(json "$QUEUE")
  )
  while IFS= read -r line; do
    case $line in
      '#'*) continue ;;
      *@ENVIRONMENT@*) environment_entries; continue ;;
      *@QUEUE@*) [[ -n $QUEUE ]] || continue ;;
      *gke-spot*) [[ $SPOT == true ]] || continue ;;
    esac
    text=
    while [[ $line =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; do
      text+=${BASH_REMATCH[1]}${words[${BASH_REMATCH[2]}]}
      line=${BASH_REMATCH[3]}
    done
    printf '%s\n' "$text$line"
  done <"$ROOT/launch/jobset.yaml"
}

read_options 'start print status logs stop' "$@"
need NAMESPACE
need_some NUM_SLICES
need_number MAX_FAILURES GRACE_SECONDS LOG_WORKER

case $ACTION in
  start | print)
    need_command
    need TPU_TYPE IMAGE
    find_tpu
    text=$(manifest)
    if [[ $ACTION == print ]]; then
      printf '%s\n' "$text"
    else
      run_with_input "$text" kubectl --namespace="$NAMESPACE" create --filename=-
    fi
    ;;
  status)
    kube get jobset "$RUN_NAME"
    kube get pods --selector="jobset.sigs.k8s.io/jobset-name=$RUN_NAME" --output=wide
    ;;
  logs) pod_log ;;
  stop) kube delete jobset "$RUN_NAME" ;;
esac
