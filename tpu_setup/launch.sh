#!/usr/bin/env bash
# Starts the same command on every worker, in tmux, through the restart supervisor.
#
#     tpu_setup/launch.sh --run=RUN [--name=NAME] [--env=FILE] [--dry-run] -- COMMAND [ARGUMENT ...]
#
# For example
#
#     tpu_setup/launch.sh --run=first -- \
#         python experiments/train.py --config=experiments/configs/synthetic.py
#
# A train.py without --workdir gets gs://BUCKET/runs/RUN. What each worker prints goes to
# gs://BUCKET/logs/RUN/HOST.log. The command outlives this script and the connection.

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
check_run
check_command
require_ready
on_workers "$(worker_command start "$RUN" "gs://$BUCKET/logs/$RUN" "$LOG_SECONDS" \
  python experiments/supervise.py --max_restarts="$MAX_RESTARTS" -- \
  "${COMMAND[@]}" ${WORKDIR_FLAG:+"$WORKDIR_FLAG"})"
report "$RUN is started on $TPU_NAME; tpu_setup/status.sh --name=$TPU_NAME --run=$RUN tells how it stands"
