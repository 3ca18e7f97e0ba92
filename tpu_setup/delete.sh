#!/usr/bin/env bash
# Deletes the TPU, and the request for it: from then on it costs nothing. The bucket stays.
#
#     tpu_setup/delete.sh [--yes] [--name=NAME] [--env=FILE] [--dry-run]
#
# --yes does not ask.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

YES=false

script_flag() {
  case "$1" in
    --yes) YES=true ;;
    *) return 1 ;;
  esac
}

parse_flags "$@"
if [[ $CREATE_WITH == vm ]]; then
  state="$(describe tpu-vm "$TPU_NAME" state)"
else
  state="$(describe queued-resources "$TPU_NAME" state.state)"
fi
if [[ $state == ABSENT ]]; then
  say "there is no $TPU_NAME in $ZONE of $PROJECT; nothing to delete"
  exit 0
fi
if [[ $YES == false && $DRY_RUN == false ]]; then
  [[ -t 0 ]] || mistake "there is nobody to ask whether to delete $TPU_NAME: pass --yes"
  read -r -p "Delete $TPU_NAME ($state) in $ZONE of $PROJECT, and what runs on it? [y/N] " answer
  [[ $answer == y || $answer == yes ]] || fail "nothing was deleted"
fi
if [[ $CREATE_WITH == vm ]]; then
  tpus tpu-vm delete "$TPU_NAME" --quiet
else
  tpus queued-resources delete "$TPU_NAME" --force --quiet
fi
