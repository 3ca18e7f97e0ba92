#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: an image of the committed code, and a JobSet of its pods.
#
#     tpu_setup/gke.sh image
#     tpu_setup/gke.sh pool
#     tpu_setup/gke.sh check
#     tpu_setup/gke.sh launch --run=RUN -- COMMAND [ARGUMENT ...]
#     tpu_setup/gke.sh status --run=RUN
#     tpu_setup/gke.sh logs --run=RUN
#     tpu_setup/gke.sh delete --run=RUN
#     tpu_setup/gke.sh delete-pool [--yes]
#
# Each also takes --env=FILE and --dry-run. `image` builds with Cloud Build and pushes to GKE_IMAGE.
# `pool` makes what is missing of SLICES node pools. `check` runs check_env.py on them, as the run
# named check. `launch` creates the JobSet that tpu_setup/jobset.py describes; a train.py without
# --workdir gets gs://BUCKET/runs/RUN. The cluster needs the JobSet controller; docs/tpu.md tells how.
#
# The last line of `status` is one word for programs, 'state: WORD':
#   running, done, failed   of the run
#   waiting                 not all pods have a node yet
#   none                    there is no such run

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

JOBSET_RELEASE=v0.10.1 # the first that tells a preemption from a mistake
RUN=""
YES=false
ACTION="${1:-}"

script_flag() {
  case "$1" in
    --run=*) RUN="${1#*=}" ;;
    --yes) YES=true ;;
    *) return 1 ;;
  esac
}

check_gke() {
  local variable
  check_match GKE_CLUSTER '[a-z][a-z0-9-]*' 'names of clusters' "'gcloud container clusters list' shows yours"
  check_match GKE_LOCATION '[a-z]+-[a-z]+[0-9]+(-[a-z])?' 'regions and zones' \
    "'gcloud container clusters list' shows that of your cluster"
  check_match GKE_ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'zones such as us-central1-c' \
    "'gcloud compute tpus locations list' shows those with TPUs"
  check_match GKE_NAMESPACE '[a-z0-9]([a-z0-9-]*[a-z0-9])?' 'names of namespaces' "take default if in doubt"
  check_match GKE_IMAGE '[a-z0-9.-]+(/[a-z0-9._-]+)+' 'repository and image, without a tag' \
    "'gcloud artifacts repositories list' shows your repositories"
  check_match GKE_POOL '[a-z]([a-z0-9-]{0,28}[a-z0-9])?' \
    'lower-case letters, digits and -, starting with a letter, 30 at most' 'choose another name'
  check_match GKE_CHIPS '([1-9][0-9]*)?' 'numbers from 1, or nothing' 'leave it empty if in doubt'
  check_match GKE_RESTARTS '[0-9]+' 'numbers from 0' 'tpu_setup/env.sh.example has a sound one'
  for variable in GKE_ACCELERATOR GKE_TOPOLOGY; do
    check_match "$variable" '[a-z0-9-]+' 'those that docs/tpu.md lists' 'take that of your node pool'
  done
  if [[ $DRY_RUN == false && $ACTION != image ]]; then
    command -v kubectl >/dev/null || mistake "there is no kubectl on the PATH: 'gcloud components" \
      "install kubectl gke-gcloud-auth-plugin'"
  fi
}

# jobset FLAG...: calls jobset.py with the settings of the slices.
jobset() {
  local python="$ROOT/.venv/bin/python" place=--nospot
  [[ -x $python ]] || python=python3
  "$python" -c 'import absl, ml_collections, yaml' 2>/dev/null ||
    mistake "$python lacks the packages of requirements.txt, which describe the JobSet: 'make demo'" \
      "in $ROOT installs them into .venv"
  if [[ "$SPOT" == true ]]; then place=--spot; fi
  PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu "$python" "$HERE/jobset.py" \
    --accelerator="$GKE_ACCELERATOR" --topology="$GKE_TOPOLOGY" --chips="${GKE_CHIPS:-0}" \
    --slices="$SLICES" "$place" "$@"
}

read_shape() {
  local shape
  shape="$(jobset)" || exit
  read -r MACHINE HOSTS _ DEVICES PLACEMENT <<<"$shape"
}

read_commit() {
  git -C "$ROOT" rev-parse --short HEAD ||
    mistake "$ROOT is no git repository: images are named by their commit"
}

kube() { run kubectl --namespace="$GKE_NAMESPACE" "$@"; }

clusters() { run gcloud container "$@" --location="$GKE_LOCATION" --project="$PROJECT"; }

connect() { clusters clusters get-credentials "$GKE_CLUSTER"; }

# is_missing COMMAND...: whether what it describes is not there; under --dry-run it is not.
is_missing() {
  if [[ $DRY_RUN == true ]]; then
    print_command "$@"
    return 0
  fi
  local errors
  if errors="$("$@" 2>&1 >/dev/null)"; then return 1; fi
  grep -qiE 'NOT_FOUND|not found|notfound' <<<"$errors" || fail "$errors"
}

pool_names() {
  local slice
  for ((slice = 0; slice < SLICES; slice++)); do say "$GKE_POOL-$slice"; done
}

make_pools() {
  # A policy cannot be changed, so its name says its topology.
  local name policy="$GKE_POOL-$GKE_TOPOLOGY" flags=("--num-nodes=$HOSTS")
  case "$PLACEMENT" in
    topology) flags+=("--tpu-topology=$GKE_TOPOLOGY") ;;
    policy)
      flags+=("--placement-policy=$policy")
      if is_missing gcloud compute resource-policies describe "$policy" --region="${GKE_ZONE%-*}" \
        --project="$PROJECT"; then
        run gcloud compute resource-policies create workload-policy "$policy" \
          --type=HIGH_THROUGHPUT --accelerator-topology="$GKE_TOPOLOGY" --region="${GKE_ZONE%-*}" \
          --project="$PROJECT"
      fi
      ;;
  esac
  if [[ $SPOT == true ]]; then flags+=(--spot); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then flags+=("--service-account=$SERVICE_ACCOUNT"); fi
  for name in $(pool_names); do
    if is_missing gcloud container node-pools describe "$name" --cluster="$GKE_CLUSTER" \
      --location="$GKE_LOCATION" --project="$PROJECT"; then
      # The pods write to the bucket as their nodes: these need more than the default scopes.
      clusters node-pools create "$name" --cluster="$GKE_CLUSTER" --node-locations="$GKE_ZONE" \
        --machine-type="$MACHINE" "${flags[@]}" --scopes=cloud-platform
    else
      report "$name is there already"
    fi
  done
}

delete_pools() {
  local name names
  names="$(pool_names)"
  names="${names//$'\n'/ }"
  if [[ $YES == false && $DRY_RUN == false ]]; then
    [[ -t 0 ]] || mistake "there is nobody to ask whether to delete $names: pass --yes"
    local answer
    read -r -p "Delete the node pools $names of $GKE_CLUSTER, and what runs there? [y/N] " answer
    [[ $answer == y || $answer == yes ]] || fail "nothing was deleted"
  fi
  for name in $names; do
    clusters node-pools delete "$name" --cluster="$GKE_CLUSTER" --quiet
  done
  if [[ $PLACEMENT == policy ]]; then
    run gcloud compute resource-policies delete "$GKE_POOL-$GKE_TOPOLOGY" \
      --region="${GKE_ZONE%-*}" --quiet --project="$PROJECT"
  fi
}

# launch MAX_RESTARTS RESTARTS WORD...
launch() {
  local commit manifest errors
  commit="$(read_commit)"
  manifest="$(jobset --run="$RUN" --namespace="$GKE_NAMESPACE" --image="$GKE_IMAGE:$commit" \
    --max_restarts="$1" --restarts="$2" -- "${@:3}")" || exit
  connect
  # An older controller would drop the rules that tell a preemption from a mistake, or refuse them.
  kube explain jobsets.spec.failurePolicy.rules.onJobFailureMessagePatterns >/dev/null ||
    fail "the cluster knows no JobSet of $JOBSET_RELEASE or newer; kubectl's message is above. Where that is" \
      "the matter: 'kubectl apply --server-side" \
      "--filename=https://github.com/kubernetes-sigs/jobset/releases/download/$JOBSET_RELEASE/manifests.yaml'"
  if [[ $DRY_RUN == true ]]; then
    print_command kubectl --namespace="$GKE_NAMESPACE" create --filename=-
    say "$manifest"
  elif ! errors="$(kubectl --namespace="$GKE_NAMESPACE" create --filename=- <<<"$manifest" 2>&1)"; then
    [[ $errors != *AlreadyExists* ]] || fail "there is a run $RUN already: 'tpu_setup/gke.sh delete" \
      "--run=$RUN', after which the same launch goes on from its last checkpoint; or another --run"
    fail "$errors"
  else
    say "$errors"
    say "$RUN is started; 'tpu_setup/gke.sh status --run=$RUN' tells how it stands"
  fi
}

tell_status() {
  local state pods
  kube get jobset,pods --selector="atommem/run=$RUN" --output=wide
  if [[ $DRY_RUN == true ]]; then
    ask_status >/dev/null
    return
  fi
  state="$(ask_status)"
  case "$state" in
    Completed*) say "state: done" ;;
    Failed*)
      say "why: ${state#Failed }"
      say "state: failed"
      ;;
    *)
      pods="$(kubectl --namespace="$GKE_NAMESPACE" get pods --selector="atommem/run=$RUN" \
        '--output=jsonpath={.items[*].status.phase}')"
      if ! kubectl --namespace="$GKE_NAMESPACE" get jobset "$RUN" >/dev/null 2>&1; then
        say "state: none"
      elif [[ -z $pods || $pods == *Pending* ]]; then
        say "state: waiting"
      else
        say "state: running"
      fi
      ;;
  esac
}

# ask_status: how the JobSet has ended, and why where it has failed; nothing while it has not.
ask_status() {
  kube get jobset "$RUN" --ignore-not-found \
    '--output=jsonpath={.status.terminalState} {.status.conditions[?(@.type=="Failed")].message}'
}

case "$ACTION" in
  image | pool | check | launch | status | logs | delete | delete-pool) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *)
    mistake "'$ACTION': allowed actions are image, pool, check, launch, status, logs, delete and" \
      "delete-pool; see --help"
    ;;
esac
parse_flags "$@"
check_gke
case "$ACTION" in
  launch | status | logs | delete)
    check_run
    ((${#RUN} <= 40)) || mistake "--run='$RUN': on Kubernetes 40 characters are allowed, for names of" \
      "pods are made of it; shorten it"
    ;;
  pool | check | delete-pool) read_shape ;;
esac

case "$ACTION" in
  image)
    COMMIT="$(read_commit)"
    # From an archive of HEAD: an image named by a commit must hold that commit and nothing else.
    source_archive="${TMPDIR:-/tmp}/atommem_jax-$COMMIT.tar.gz"
    run git -C "$ROOT" archive --format=tar.gz --output="$source_archive" HEAD
    run gcloud builds submit "$source_archive" --config="$HERE/gke/cloudbuild.yaml" \
      --substitutions="_IMAGE=$GKE_IMAGE:$COMMIT,_PYTHON_VERSION=$PYTHON_VERSION" --project="$PROJECT"
    ;;
  pool) make_pools ;;
  check)
    RUN=check
    launch 0 0 python tpu_setup/check_env.py --require_tpu --expect_devices="$DEVICES" \
      --bucket="gs://$BUCKET"
    ;;
  launch)
    check_command
    launch "$MAX_RESTARTS" "$GKE_RESTARTS" "${COMMAND[@]}" ${WORKDIR_FLAG:+"$WORKDIR_FLAG"}
    ;;
  status)
    connect
    tell_status
    ;;
  logs)
    connect
    kube logs --selector="atommem/run=$RUN" --all-containers --prefix --tail=100 --max-log-requests=64
    ;;
  delete)
    connect
    kube delete jobset "$RUN" --ignore-not-found
    ;;
  delete-pool) delete_pools ;;
esac
