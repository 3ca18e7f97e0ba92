#!/usr/bin/env bash
# The part that runs on a worker; launch.sh and the others call it through ssh.
#
#     worker.sh install PYTHON_VERSION UV_VERSION
#     worker.sh start RUN LOG_URL LOG_SECONDS COMMAND [ARGUMENT ...]
#     worker.sh status [RUN]
#     worker.sh stop [RUN]
#
# A run is a tmux session of its name and a folder under ~/.atommem_runs with its log, the process
# id of its command, and in the end the exit code. A line for programs reads
# 'atommem HOST RUN STATE [EXIT_CODE]', with the states that status.sh explains.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUNS="${ATOMMEM_RUNS:-$HOME/.atommem_runs}"
SOCKET="${ATOMMEM_TMUX:-atommem}" # of the tmux server: `tmux -L atommem attach -t RUN` looks at a run
GRACE_SECONDS="${ATOMMEM_GRACE_SECONDS:-60}"
PATH="$PWD/.venv/bin:$PATH"

install() {
  command -v tmux >/dev/null || { sudo apt-get update -q && sudo apt-get install -yq tmux; }
  # Newer images refuse packages outside an environment unless told; older pips do not know the word.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --disable-pip-version-check \
    "uv==$2"
  local uv=(python3 -m uv)
  if [[ "$(.venv/bin/python --version 2>/dev/null)" != "Python $1" ]]; then
    "${uv[@]}" venv --clear --python "$1" .venv
  fi
  "${uv[@]}" pip install --quiet --python .venv/bin/python \
    --constraint constraints.txt --editable '.[tpu]'
  echo "$(hostname): $(.venv/bin/python --version), code $(cat COMMIT)"
}

start() {
  local run="$1" folder="$RUNS/$1"
  if tmux -L "$SOCKET" has-session -t "=$run" 2>/dev/null; then
    echo "$(hostname): $run is at work already; stop.sh --run=$run ends it" >&2
    exit 1
  fi
  # A lock that a killed process has left behind would keep the TPU from the new one.
  python tpu_setup/check_env.py --checks=lock --remove_stale_lock >&2
  mkdir -p "$folder"
  rm -f "$folder/exit_code" "$folder/pid" "$folder/stopped"
  tmux -L "$SOCKET" new-session -d -s "$run" "$(printf '%q ' "$PWD/tpu_setup/worker.sh" attend "$@")"
  report "$run"
}

# Inside tmux: the command, and the copies of its log.
attend() {
  local folder="$RUNS/$1" url="$2" seconds="$3" code=0
  local log="$folder/log.txt"
  printf '==== %s, commit %s: %s\n' "$(date -u +%FT%TZ)" "$(cat COMMIT 2>/dev/null || echo unknown)" \
    "${*:4}" >>"$log"
  set -m # the command leads a process group, which `stop` can signal as a whole
  PYTHONUNBUFFERED=1 "${@:4}" >>"$log" 2>&1 &
  local pid=$!
  echo "$pid" >"$folder/pid"
  tail -n +1 -f --pid="$pid" "$log" & # for who attaches
  { while sleep "$seconds"; do ship "$log" "$url"; done; } &
  local shipper=$!
  wait "$pid" || code=$?
  kill -- "-$shipper" 2>/dev/null || true
  printf '==== %s, ended with status %s\n' "$(date -u +%FT%TZ)" "$code" >>"$log"
  ship "$log" "$url"
  echo "$code" >"$folder/exit_code"
}

# ship LOG URL: a copy that fails is tried again with the next.
ship() { gcloud storage cp --quiet "$1" "$2/$(hostname).log" >/dev/null 2>&1 || true; }

status() {
  if (($#)); then
    report "$1"
    tail -n 3 "$RUNS/$1/log.txt" 2>/dev/null | tr '\r' '\n' | tail -n 3 | sed 's/^/    /' || true
  elif compgen -G "$RUNS/*" >/dev/null; then
    local folder
    for folder in "$RUNS"/*; do report "$(basename "$folder")"; done
  else
    echo "atommem $(hostname) - none"
  fi
}

report() {
  local folder="$RUNS/$1" state code=""
  if [[ -f $folder/exit_code ]]; then code="$(cat "$folder/exit_code")"; fi
  if [[ $code == 0 ]]; then
    state="done"
  elif [[ -f $folder/stopped ]]; then
    state=stopped
  elif [[ -n $code ]]; then
    state=failed
  elif tmux -L "$SOCKET" has-session -t "=$1" 2>/dev/null; then
    state=running
  elif [[ -d $folder ]]; then
    state=lost
  else
    state=none
  fi
  echo "atommem $(hostname) $1 $state${code:+ $code}"
}

stop() {
  local runs=("$@") run
  if ! (($#)); then
    runs=()
    while read -r run; do runs+=("$run"); done < <(
      tmux -L "$SOCKET" list-sessions -F '#{session_name}' 2>/dev/null || true
    )
  fi
  for run in ${runs[@]+"${runs[@]}"}; do
    if tmux -L "$SOCKET" has-session -t "=$run" 2>/dev/null; then end "$run"; fi
    report "$run"
  done
}

end() {
  local folder="$RUNS/$1" pid family waited=0
  pid="$(cat "$folder/pid" 2>/dev/null || true)"
  touch "$folder/stopped"
  if [[ -n $pid ]]; then
    # Listed before the signal: who loses a parent can no longer be found through it.
    family="$(descendants "$pid")"
    kill -TERM -- "-$pid" 2>/dev/null || true
    while [[ ! -f $folder/exit_code ]] && ((waited < GRACE_SECONDS * 5)); do
      sleep 0.2
      waited=$((waited + 1))
    done
    # shellcheck disable=SC2086  # a list of numbers
    kill -KILL $family 2>/dev/null || true
    waited=0
    while [[ ! -f $folder/exit_code ]] && ((waited < 50)); do
      sleep 0.2
      waited=$((waited + 1))
    done
  fi
  tmux -L "$SOCKET" kill-session -t "=$1" 2>/dev/null || true
}

# descendants PID: itself and all below it.
descendants() {
  local child
  echo "$1"
  for child in $(pgrep -P "$1" || true); do descendants "$child"; done
}

case "${1:-}" in
  install | start | attend | status | stop) "$@" ;;
  *)
    sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
