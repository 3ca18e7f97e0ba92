#!/usr/bin/env bash
# Tells how the TPU stands, and the runs on each of its workers.
#
#     tpu_setup/status.sh [--run=RUN] [--name=NAME] [--env=FILE] [--dry-run]
#
# With --run the last line is one word for programs, 'state: WORD':
#   running, done, failed, stopped   of the run, over all workers
#   lost                             a worker was restarted, and the run with it
#   none                             a worker knows nothing of the run
#   waiting                          the TPU is not there yet
#   gone                             the TPU was preempted, deleted or refused
#   unreachable                      the TPU is there, but a worker does not answer

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RUN=""

script_flag() {
  case "$1" in
    --run=*) RUN="${1#*=}" ;;
    *) return 1 ;;
  esac
}

# conclude WORD
conclude() {
  if [[ -n $RUN ]]; then say "state: $1"; fi
  exit 0
}

parse_flags "$@"
if [[ -n $RUN ]]; then check_run; fi
state="$(tpu_state)"
report "$TPU_NAME ($SLICES x $ACCELERATOR_TYPE, $ZONE): $state"
if is_gone "$state"; then conclude gone; fi
if [[ $state != READY ]]; then conclude waiting; fi

# worker.sh comes with the code: without the code there are no runs.
ask="$(say "test -x $REMOTE_DIR/tpu_setup/worker.sh || { echo atommem \$(hostname) - none; exit; };" \
  "$(worker_command status ${RUN:+"$RUN"})")"
if [[ $DRY_RUN == true ]]; then
  on_workers "$ask"
  exit 0
fi
if ! answers="$(on_workers "$ask")"; then
  say "$answers"
  conclude unreachable
fi
say "$answers"
found="$(awk '$1 == "atommem" {print $4}' <<<"$answers")"
# The worst of the workers speaks for the run.
for word in failed stopped lost none running 'done'; do
  if grep -qx "$word" <<<"$found"; then conclude "$word"; fi
done
conclude unreachable
