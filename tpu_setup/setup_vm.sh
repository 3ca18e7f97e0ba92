#!/usr/bin/env bash
# Installs the committed code, with its pinned requirements, on all workers; then checks them.
#
#     tpu_setup/setup_vm.sh [--no-check] [--name=NAME] [--env=FILE] [--dry-run]
#
# The code goes through the bucket as an archive of HEAD, so that the VMs need no access to the
# repository and each run can be told its commit. A second call brings a newer commit.
#
# --no-check leaves out tpu_setup/check_env.py.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

CHECK=true

script_flag() {
  case "$1" in
    --no-check) CHECK=false ;;
    *) return 1 ;;
  esac
}

parse_flags "$@"
require_ready
commit="$(git -C "$ROOT" rev-parse --short HEAD)" ||
  mistake "$ROOT is no git repository: the code is sent as a commit; clone it instead of copying it"
if [[ -n "$(git -C "$ROOT" status --porcelain --untracked-files=no)" ]]; then
  warn "files differ from commit $commit; what is not committed is not sent"
fi

archive="atommem_jax-$commit.tar.gz"
local_archive="${TMPDIR:-/tmp}/$archive"
run git -C "$ROOT" archive --format=tar.gz --output="$local_archive" HEAD
run gcloud storage cp "$local_archive" "gs://$BUCKET/code/$archive" --project="$PROJECT"

# Modules that a newer commit has dropped must not be found any more.
on_workers "$(say "mkdir -p $REMOTE_DIR && cd $REMOTE_DIR && rm -rf atommem_jax experiments &&" \
  "gcloud storage cp gs://$BUCKET/code/$archive /tmp/$archive && tar xzf /tmp/$archive &&" \
  "echo $commit > COMMIT && tpu_setup/worker.sh install $PYTHON_VERSION $UV_VERSION")"

if [[ $CHECK == true ]]; then
  on_workers "$(say "cd $REMOTE_DIR && .venv/bin/python tpu_setup/check_env.py --require_tpu" \
    "--expect_devices=$(expected_devices) --bucket=gs://$BUCKET")"
fi
report "$TPU_NAME has commit $commit; next: tpu_setup/launch.sh --name=$TPU_NAME --run=RUN --" \
  "python experiments/train.py --config=..."
