#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: an image of the committed code, and a JobSet of its pods.
#
#     tpu_setup/gke.sh image
#     tpu_setup/gke.sh launch --run=RUN -- COMMAND [ARGUMENT ...]
#     tpu_setup/gke.sh status --run=RUN
#     tpu_setup/gke.sh logs --run=RUN
#     tpu_setup/gke.sh delete --run=RUN
#
# Each also takes --env=FILE and --dry-run. `image` builds with Cloud Build and pushes to GKE_IMAGE.
# `launch` fills in tpu_setup/gke/jobset.yaml from env.sh; a train.py without --workdir gets
# gs://BUCKET/runs/RUN. The cluster needs the JobSet controller; docs/tpu.md tells how.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RUN=""
ACTION="${1:-}"

script_flag() {
  case "$1" in
    --run=*) RUN="${1#*=}" ;;
    *) return 1 ;;
  esac
}

check_gke() {
  local variable
  check_match GKE_CLUSTER '[a-z][a-z0-9-]*' 'names of clusters' "'gcloud container clusters list' shows yours"
  check_match GKE_LOCATION '[a-z]+-[a-z]+[0-9]+(-[a-z])?' 'regions and zones' \
    "'gcloud container clusters list' shows that of your cluster"
  check_match GKE_NAMESPACE '[a-z0-9]([a-z0-9-]*[a-z0-9])?' 'names of namespaces' "take default if in doubt"
  check_match GKE_SERVICE_ACCOUNT '[a-z0-9]([a-z0-9.-]*[a-z0-9])?' 'names of Kubernetes accounts' \
    "'kubectl get serviceaccounts' shows yours"
  check_match GKE_IMAGE '[a-z0-9.-]+(/[a-z0-9._-]+)+' 'repository and image, without a tag' \
    "'gcloud artifacts repositories list' shows your repositories"
  check_match GKE_ACCELERATOR 'tpu[a-z0-9-]+' 'names such as tpu-v5-lite-podslice' \
    'tpu_setup/env.sh.example lists them'
  check_match GKE_TOPOLOGY '[0-9]+x[0-9]+(x[0-9]+)?' 'topologies such as 4x4 or 2x2x4' \
    'take that of your node pool'
  for variable in GKE_HOSTS GKE_CHIPS; do
    check_match "$variable" '[1-9][0-9]*' 'numbers from 1' 'see its comment in tpu_setup/env.sh.example'
  done
  local chips=$((${GKE_TOPOLOGY//x/*}))
  ((GKE_HOSTS * GKE_CHIPS == chips)) || mistake "GKE_HOSTS=$GKE_HOSTS and GKE_CHIPS=$GKE_CHIPS in" \
    "$ENV_FILE make $((GKE_HOSTS * GKE_CHIPS)) chips, and GKE_TOPOLOGY=$GKE_TOPOLOGY has $chips:" \
    "correct one of the three"
  if [[ $DRY_RUN == false && $ACTION != image ]]; then
    command -v kubectl >/dev/null || mistake "there is no kubectl on the PATH: 'gcloud components" \
      "install kubectl gke-gcloud-auth-plugin'"
  fi
}

read_commit() {
  git -C "$ROOT" rev-parse --short HEAD ||
    mistake "$ROOT is no git repository: images are named by their commit"
}

# render: jobset.yaml with every ${VARIABLE} filled in; the command last, for it may say ${...} too.
render() {
  local text name value
  text="$(cat "$HERE/gke/jobset.yaml")"
  for name in RUN NAMESPACE SLICES MAX_RESTARTS HOSTS SERVICE_ACCOUNT SPOT_OPERATOR ACCELERATOR \
    TOPOLOGY IMAGE CHIPS COMMAND; do
    case "$name" in
      COMMAND) value="$(list_json "${COMMAND[@]}" ${WORKDIR_FLAG:+"$WORKDIR_FLAG"})" || exit ;;
      IMAGE) value="$GKE_IMAGE:$COMMIT" ;;
      SPOT_OPERATOR) if [[ $SPOT == true ]]; then value=Exists; else value=DoesNotExist; fi ;;
      RUN | SLICES | MAX_RESTARTS) value="${!name}" ;;
      *)
        value="GKE_$name"
        value="${!value}"
        ;;
    esac
    text="$(replace_all "$text" "\${$name}" "$value")"
  done
  printf '%s\n' "$text"
}

# replace_all TEXT FROM TO: literally, in every bash: what ${TEXT//FROM/TO} makes of quotes, \ and &
# in TO depends on its version.
replace_all() {
  local rest="$1" before=""
  while [[ $rest == *"$2"* ]]; do
    before+="${rest%%"$2"*}$3"
    rest="${rest#*"$2"}"
  done
  printf '%s' "$before$rest"
}

# list_json WORD...: a JSON list, which YAML reads too.
list_json() {
  local word list=""
  for word in "$@"; do
    word="$(replace_all "$word" "\\" "\\\\")"
    word="$(replace_all "$word" '"' '\"')"
    # shellcheck disable=SC2016  # as it stands: Kubernetes would expand it
    word="$(replace_all "$word" '$(' '$$(')"
    [[ $word != *[$'\n\t']* ]] || mistake "an argument of the command" \
      "has a tab or a line break in it: remove it"
    list+="${list:+, }\"$word\""
  done
  printf '[%s]' "$list"
}

kube() { run kubectl --namespace="$GKE_NAMESPACE" "$@"; }

connect() {
  run gcloud container clusters get-credentials "$GKE_CLUSTER" --location="$GKE_LOCATION" \
    --project="$PROJECT"
}

case "$ACTION" in
  image | launch | status | logs | delete) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *) mistake "'$ACTION': allowed actions are image, launch, status, logs and delete; see --help" ;;
esac
parse_flags "$@"
check_gke
if [[ $ACTION != image ]]; then
  check_run
  ((${#RUN} <= 40)) || mistake "--run='$RUN': on Kubernetes 40 characters are allowed, for names of" \
    "pods are made of it; shorten it"
fi

case "$ACTION" in
  image)
    COMMIT="$(read_commit)"
    # From an archive of HEAD: an image named by a commit must hold that commit and nothing else.
    source_archive="${TMPDIR:-/tmp}/atommem_jax-$COMMIT.tar.gz"
    run git -C "$ROOT" archive --format=tar.gz --output="$source_archive" HEAD
    run gcloud builds submit "$source_archive" --config="$HERE/gke/cloudbuild.yaml" \
      --substitutions="_IMAGE=$GKE_IMAGE:$COMMIT,_PYTHON_VERSION=$PYTHON_VERSION" --project="$PROJECT"
    ;;
  launch)
    check_command
    COMMIT="$(read_commit)"
    manifest="$(render)"
    connect
    if [[ $DRY_RUN == true ]]; then
      print_command kubectl --namespace="$GKE_NAMESPACE" apply --filename=-
      say "$manifest"
    else
      kubectl --namespace="$GKE_NAMESPACE" apply --filename=- <<<"$manifest"
    fi
    ;;
  status)
    connect
    kube get jobset,pods --selector="atommem/run=$RUN" --output=wide
    ;;
  logs)
    connect
    kube logs --selector="atommem/run=$RUN" --all-containers --prefix --tail=100 --max-log-requests=64
    ;;
  delete)
    connect
    kube delete jobset "$RUN" --ignore-not-found
    ;;
esac
