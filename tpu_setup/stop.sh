#!/usr/bin/env bash
# Ends a run on all workers, or all runs; the TPU stays, and costs, until delete.sh.
#
#     tpu_setup/stop.sh [--run=RUN] [--name=NAME] [--env=FILE] [--dry-run]
#
# Commands are asked to end, so that a checkpoint can be finished, and killed after a while.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RUN=""

script_flag() {
  case "$1" in
    --run=*) RUN="${1#*=}" ;;
    *) return 1 ;;
  esac
}

parse_flags "$@"
if [[ -n $RUN ]]; then check_run; fi
require_ready
on_workers "$(worker_command stop ${RUN:+"$RUN"})"
