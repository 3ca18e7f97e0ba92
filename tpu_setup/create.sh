#!/usr/bin/env bash
# Creates the TPU that env.sh describes, and waits until it is ready.
#
#     tpu_setup/create.sh [--no-wait] [--name=NAME] [--env=FILE] [--dry-run]
#
# It may be called again at any time: what is ready stays, what waits in the queue is waited for,
# and what was preempted or has failed is deleted and asked for anew. A lack of capacity is tried
# again RETRIES times; a quota or a permission that is missing ends it, for time does not help. Why a
# request has failed in the queue is printed before it is deleted.
#
# --no-wait leaves after the request has been queued.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

WAIT=true

script_flag() {
  case "$1" in
    --no-wait) WAIT=false ;;
    *) return 1 ;;
  esac
}

request() {
  local flags=(--accelerator-type="$ACCELERATOR_TYPE")
  if [[ $SPOT == true ]]; then flags+=(--spot); fi
  if [[ $INTERNAL_IPS == true ]]; then flags+=(--internal-ips); fi
  if [[ -n $NETWORK ]]; then flags+=(--network="$NETWORK"); fi
  if [[ -n $SUBNETWORK ]]; then flags+=(--subnetwork="$SUBNETWORK"); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then flags+=(--service-account="$SERVICE_ACCOUNT"); fi
  if [[ $CREATE_WITH == vm ]]; then
    tpus tpu-vm create "$TPU_NAME" --version="$RUNTIME_VERSION" "${flags[@]}"
  elif ((SLICES == 1)); then
    tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
      --runtime-version="$RUNTIME_VERSION" "${flags[@]}"
  else
    tpus queued-resources create "$TPU_NAME" --node-prefix="$TPU_NAME" --node-count="$SLICES" \
      --runtime-version="$RUNTIME_VERSION" "${flags[@]}"
  fi
}

remove() {
  if [[ $CREATE_WITH == vm ]]; then
    tpus tpu-vm delete "$TPU_NAME" --quiet
  else
    tpus queued-resources delete "$TPU_NAME" --force --quiet
  fi
}

# end_if_lasting FILE: ends the script where what the message says does not pass with time.
end_if_lasting() {
  if grep -qiE 'per minute|rate limit' "$1"; then return; fi
  if grep -qi 'quota' "$1"; then
    fail "the quota of project $PROJECT is not enough for $ACCELERATOR_TYPE (spot: $SPOT) in $ZONE." \
      "Ask for more at https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT (service" \
      "Cloud TPU API), or change ACCELERATOR_TYPE, SPOT or ZONE in $ENV_FILE. Not tried again."
  fi
  if grep -qiE 'PERMISSION_DENIED|has not been used|is disabled|UNAUTHENTICATED' "$1"; then
    explain_access
    fail "access was refused; gcloud's message is above. Not tried again."
  fi
}

# judge FILE: whether gcloud's message is of a kind that passes; ends the script if it is not.
judge() {
  end_if_lasting "$1"
  if grep -qiE 'per minute|rate limit' "$1"; then return; fi
  grep -qE 'o more capacity|ot enough resources|tockout|ry again|RESOURCE_EXHAUSTED|UNAVAILABLE' "$1" ||
    grep -qE 'INTERNAL|DEADLINE_EXCEEDED|ALREADY_EXISTS' "$1" ||
    fail "gcloud refused the request; its message is above. Not tried again."
}

# tell_failure: prints why the request has failed in the queue, which is gone once it is deleted;
# ends the script where asking anew would not help.
tell_failure() {
  if [[ $CREATE_WITH != queued ]]; then return; fi
  describe queued-resources "$TPU_NAME" state.failedData.error >"$ERRORS"
  say "$TPU_NAME has failed: $(cat "$ERRORS")"
  end_if_lasting "$ERRORS"
}

# ask: requests the TPU, again while there is no capacity.
ask() {
  say "asking for $TPU_NAME: $SLICES x $ACCELERATOR_TYPE in $ZONE (with $CREATE_WITH, spot: $SPOT)"
  while ! request 2>"$ERRORS"; do
    cat "$ERRORS" >&2
    judge "$ERRORS"
    again "the request did not pass"
  done
}

# again REASON: counts a try, and waits before the next.
again() {
  local other=""
  if [[ $CREATE_WITH != queued ]]; then other=", or with CREATE_WITH=queued"; fi
  ((TRIES < RETRIES)) || fail "$1, and RETRIES=$RETRIES in $ENV_FILE are used up: try later, or" \
    "another ZONE$other"
  TRIES=$((TRIES + 1))
  say "$1: try $TRIES of $RETRIES in $RETRY_SECONDS s"
  sleep "$RETRY_SECONDS"
}

finish() {
  say "$TPU_NAME is ready; next: tpu_setup/setup_vm.sh --name=$TPU_NAME"
  exit 0
}

parse_flags "$@"
TRIES=0
ERRORS="$(mktemp)"
trap 'rm -f "$ERRORS"' EXIT

if [[ $DRY_RUN == true ]]; then
  say "# what there is"
  tpu_state >/dev/null
  say "# where there is nothing"
  request
  say "# where it was preempted, or has failed"
  tell_failure >/dev/null
  remove
  request
  exit 0
fi

waited=0
while true; do
  state="$(tpu_state)"
  if [[ $state == READY ]]; then finish; fi
  case "$state" in
    ABSENT) ask ;;
    STOPPED)
      fail "$TPU_NAME is STOPPED: start it with 'gcloud compute tpus tpu-vm start $TPU_NAME" \
        "--zone=$ZONE --project=$PROJECT', or delete.sh it"
      ;;
    DELETING | SUSPENDING) ;;
    *)
      if is_gone "$state"; then
        if [[ $state == FAILED ]]; then tell_failure; fi
        # A request that failed in the queue counts as a try; a preemption does not.
        if [[ $state == FAILED ]]; then again "the request has failed in the queue"; fi
        say "$TPU_NAME is $state: it is deleted and asked for anew"
        remove
        ask
      fi
      ;;
  esac
  if [[ $WAIT == false ]]; then
    say "$TPU_NAME is in the queue; tpu_setup/status.sh --name=$TPU_NAME tells how it stands"
    exit 0
  fi
  state="$(tpu_state)"
  if [[ $state == READY ]]; then finish; fi
  ((waited < WAIT_SECONDS)) || fail "$TPU_NAME is $state after WAIT_SECONDS=$WAIT_SECONDS; it stays" \
    "in the queue: call this again to go on waiting, or delete.sh"
  say "$TPU_NAME is $state; looking again in $POLL_SECONDS s"
  sleep "$POLL_SECONDS"
  waited=$((waited + (POLL_SECONDS > 0 ? POLL_SECONDS : 1)))
done
