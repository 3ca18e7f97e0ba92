#!/usr/bin/env bash
# What the scripts of this folder share: flags, settings and their checks, --dry-run, gcloud.
# It keeps to the bash 3.2 of macOS: no associative arrays, and no empty array is expanded bare.
# shellcheck disable=SC2034  # the scripts that source this file read the rest

set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"
ME="$(basename "$0")"
ENV_FILE="$HERE/env.sh"
DRY_RUN=false
NAME=""
COMMAND=()
WIDTH=100
exec 3>&1 # printed commands go there, out of reach of $(...)

# ---------------------------------------------------------------------------------------------
# Speaking

say() { printf '%s\n' "$*"; }

warn() { printf '%s: %s\n' "$ME" "$*" >&2; }

# What the user has to change: status 2.
mistake() {
  warn "$*"
  exit 2
}

# What went wrong in the cloud: status 1.
fail() {
  warn "$*"
  exit 1
}

# The comment at the top of a script is its --help.
usage() { sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; }

# quote WORD: as a shell would read it, and as plain as that allows.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf '%s' "$1"
  elif [[ $1 != *\'* ]]; then
    printf "'%s'" "$1"
  else
    printf '%q' "$1"
  fi
}

# quote_all WORD...: one line.
quote_all() {
  local line="" word
  for word in "$@"; do
    line+="${line:+ }$(quote "$word")"
  done
  printf '%s' "$line"
}

# print_command WORD...: ready to be pasted, long lines continued.
print_command() {
  local line="" text="" word
  for word in "$@"; do
    word="$(quote "$word")"
    if [[ -n $line ]] && ((${#line} + ${#word} + 3 > WIDTH)); then
      text+="$line \\"$'\n'
      line="    $word"
    else
      line+="${line:+ }$word"
    fi
  done
  printf '%s\n' "$text$line" >&3
}

# report TEXT...: what has come of it, so nothing under --dry-run.
report() { if [[ $DRY_RUN == false ]]; then say "$*"; fi; }

# run COMMAND...: runs it, or prints it under --dry-run.
run() {
  if [[ $DRY_RUN == true ]]; then print_command "$@"; else "$@"; fi
}

# ---------------------------------------------------------------------------------------------
# Flags and settings

# parse_flags "$@": the flags of all scripts; those of one script are for its function script_flag.
parse_flags() {
  while (($#)); do
    case "$1" in
      --dry-run) DRY_RUN=true ;;
      --env=*) ENV_FILE="${1#*=}" ;;
      --name=*) NAME="${1#*=}" ;;
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        COMMAND=("$@")
        break
        ;;
      *) script_flag "$1" || mistake "$1: no such flag; --help lists those there are" ;;
    esac
    shift
  done
  load_settings
}

load_settings() {
  local variable
  [[ -f $ENV_FILE ]] || mistake "there is no $ENV_FILE: copy tpu_setup/env.sh.example to it and" \
    "fill it in, or name another file with --env=FILE"
  # Not by `source`: an editor on Windows ends lines in CR LF, which would be part of every value.
  eval "$(tr -d '\r' <"$ENV_FILE")"
  if [[ -n $NAME ]]; then TPU_NAME="$NAME"; fi
  check_match PROJECT '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' 'project ids such as my-project-1' \
    "'gcloud projects list' shows yours"
  check_match ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'zones such as us-west4-a' \
    "'gcloud compute tpus locations list' shows those with TPUs"
  check_match BUCKET '[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]' 'names of buckets, without gs://' \
    "'gcloud storage buckets list' shows yours"
  check_match TPU_NAME '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
    'lower-case letters, digits and -, starting with a letter, 40 at most' 'choose another name'
  check_match ACCELERATOR_TYPE '(v[234]|v5p|v5litepod|v6e)-[1-9][0-9]*' \
    'types such as v5litepod-16, v6e-8, v5p-8 or v4-8' \
    "'gcloud compute tpus accelerator-types list' shows those of a zone"
  check_match RUNTIME_VERSION '[a-z0-9][a-z0-9.-]+' 'versions such as v2-alpha-tpuv5-lite' \
    "'gcloud compute tpus versions list' shows those of a zone"
  check_match CREATE_WITH 'queued|vm' 'queued and vm' 'take queued if in doubt'
  for variable in SPOT INTERNAL_IPS; do
    check_match "$variable" 'true|false' 'true and false' 'choose one'
  done
  for variable in NETWORK SUBNETWORK; do
    check_match "$variable" '([a-z][a-z0-9-]*)?' 'a name, or nothing' \
      "'gcloud compute networks list' shows yours"
  done
  check_match SERVICE_ACCOUNT '([^@ ]+@[^@ ]+)?' 'an address, or nothing' \
    "'gcloud iam service-accounts list' shows yours"
  check_match SLICES '[1-9][0-9]*' 'numbers from 1' 'take 1 if in doubt'
  for variable in RETRIES RETRY_SECONDS POLL_SECONDS WAIT_SECONDS MAX_RESTARTS; do
    check_match "$variable" '[0-9]+' 'numbers from 0' 'tpu_setup/env.sh.example has a sound one'
  done
  check_match LOG_SECONDS '[1-9][0-9]*' 'numbers from 1' 'tpu_setup/env.sh.example has a sound one'
  check_match REMOTE_DIR '[A-Za-z0-9_][A-Za-z0-9_.-]*' 'names of a folder in the home folder' \
    'tpu_setup/env.sh.example has one'
  check_match PYTHON_VERSION '3\.1[1-9]\.[0-9]+' 'full versions from 3.11.0' \
    'tpu_setup/env.sh.example has the one that was tested'
  check_match UV_VERSION '[0-9]+\.[0-9]+\.[0-9]+' 'full versions' \
    'tpu_setup/env.sh.example has the one that was tested'
  if ((SLICES > 1)) && [[ $CREATE_WITH != queued ]]; then
    mistake "SLICES=$SLICES in $ENV_FILE needs CREATE_WITH=queued, and it is $CREATE_WITH: only a" \
      "queued resource brings several slices; set CREATE_WITH=queued, or SLICES=1"
  fi
  if [[ $DRY_RUN == false ]]; then
    for variable in PROJECT BUCKET; do
      [[ ${!variable} != your-* ]] || mistake "$variable='${!variable}' in $ENV_FILE is that of the" \
        "example: set it to your own"
    done
    command -v gcloud >/dev/null || mistake "there is no gcloud on the PATH: install the Google" \
      "Cloud CLI (https://cloud.google.com/sdk/docs/install), then 'gcloud auth login'"
  fi
}

# check_match VARIABLE REGEX ALLOWED NEXT_STEP
check_match() {
  [[ -n ${!1+set} ]] || mistake "$1 is missing in $ENV_FILE: copy its line from" \
    "tpu_setup/env.sh.example"
  [[ ${!1} =~ ^($2)$ ]] || mistake "$1='${!1}' (in $ENV_FILE, or a flag): allowed are $3; $4"
}

# check_run: --run is a tmux session, a folder in the bucket, and a Kubernetes object.
check_run() {
  [[ $RUN =~ ^[a-z]([a-z0-9-]{0,58}[a-z0-9])?$ ]] || mistake "--run='$RUN': allowed are lower-case" \
    "letters, digits and -, starting with a letter, 60 at most; choose a name for this run"
}

# check_command: sets WORKDIR_FLAG where the training command has none of its own.
check_command() {
  ((${#COMMAND[@]})) || mistake "there is no command: end with" \
    "-- python experiments/train.py --config=experiments/configs/synthetic.py"
  WORKDIR_FLAG=""
  [[ "${COMMAND[*]}" == *experiments/train.py* ]] || return 0
  local word
  for word in "${COMMAND[@]}"; do
    case "$word" in
      --workdir=gs://* | -workdir=gs://*) return 0 ;;
      --workdir | -workdir | --workdir=* | -workdir=*)
        mistake "$word: allowed are folders in a bucket, as --workdir=gs://$BUCKET/runs/$RUN (the" \
          "default): every worker must see the same checkpoints, and they must outlive the VM"
        ;;
    esac
  done
  WORKDIR_FLAG="--workdir=gs://$BUCKET/runs/$RUN"
}

# ---------------------------------------------------------------------------------------------
# Cloud

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"; }

# describe KIND NAME FIELD: prints the field, or ABSENT; under --dry-run what it is without trouble.
describe() {
  local command=(gcloud compute tpus "$1" describe "$2" --zone="$ZONE" --project="$PROJECT")
  command+=("--format=value($3)")
  if [[ $DRY_RUN == true ]]; then
    print_command "${command[@]}"
    if [[ $1 == queued-resources ]]; then say ACTIVE; else say READY; fi
    return
  fi
  local errors state
  errors="$(mktemp)"
  if state="$("${command[@]}" 2>"$errors")"; then
    say "${state:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    say ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    explain_access
    fail "could not look at '$2'; gcloud's message is above"
  fi
  rm -f "$errors"
}

explain_access() {
  warn "if access is the matter: 'gcloud auth login'; 'gcloud services enable tpu.googleapis.com" \
    "--project=$PROJECT'; and the role TPU Admin (roles/tpu.admin) in the project"
}

# node_names: the TPU VMs, one a slice.
node_names() {
  local slice
  if ((SLICES == 1)); then
    say "$TPU_NAME"
  else
    for ((slice = 0; slice < SLICES; slice++)); do say "$TPU_NAME-$slice"; done
  fi
}

# tpu_state: READY, ABSENT, PREEMPTED, FAILED, SUSPENDED, or what else it is doing. It says `return`
# where it is not known, since bash does not carry `set -e` into a $(...).
tpu_state() {
  local state node
  if [[ $CREATE_WITH == queued ]]; then
    state="$(describe queued-resources "$TPU_NAME" state.state)" || return
    if [[ $state != ACTIVE ]]; then
      say "$state"
      return
    fi
  fi
  # A preempted VM is told of here first: the queued resource stays ACTIVE for a while.
  for node in $(node_names); do
    state="$(describe tpu-vm "$node" state)" || return
    if [[ $state == ABSENT && $CREATE_WITH == queued ]]; then state=PREEMPTED; fi
    if [[ $state != READY ]]; then
      say "$state"
      return
    fi
  done
  say READY
}

# is_gone STATE: no work can be left on it, and it will not come back by itself.
is_gone() {
  case "$1" in
    ABSENT | PREEMPTED | TERMINATED | FAILED | SUSPENDED | SUSPENDING | DELETING) return 0 ;;
    *) return 1 ;;
  esac
}

require_ready() {
  local state
  state="$(tpu_state)"
  [[ $state == READY ]] || fail "TPU '$TPU_NAME' is $state, and READY is needed: run" \
    "'tpu_setup/create.sh --name=$TPU_NAME', then setup_vm.sh"
}

# on_workers COMMAND_LINE: runs it on every worker of every slice at the same time.
on_workers() {
  local flags=(--quiet --worker=all "--command=$1")
  if [[ $INTERNAL_IPS == true ]]; then flags+=(--internal-ip); fi
  if ((SLICES == 1)); then
    tpus tpu-vm ssh "$TPU_NAME" "${flags[@]}" || give_up_on_worker
  else
    tpus queued-resources ssh "$TPU_NAME" --node=all "${flags[@]}" || give_up_on_worker
  fi
}

# The status of ssh is that of the command on a worker, 2 included, which has another meaning here.
give_up_on_worker() { fail "a worker of '$TPU_NAME' did not do it; what it said is above"; }

# worker_command WORD...: calls worker.sh in the code on a worker.
worker_command() { say "cd $REMOTE_DIR && tpu_setup/worker.sh $(quote_all "$@")"; }

# expected_devices: as JAX counts them. Types up to v5p, v5e aside, are named by TensorCores; from
# v4 on, the two of a chip are one device.
expected_devices() {
  local cores="${ACCELERATOR_TYPE##*-}"
  case "$ACCELERATOR_TYPE" in
    v4-* | v5p-*) say "$((cores * SLICES / 2))" ;;
    *) say "$((cores * SLICES))" ;;
  esac
}
