#!/usr/bin/env bash
# Runs the job on every worker of a TPU slice, joined by jax.distributed, and starts it again while
# it exits with the retry code.
#   WORKDIR=gs://bucket/run bash launch/tpu_vm.sh [--dry-run] [--setup] NAME ZONE [flags of main]
# --dry-run prints the exact commands and runs none. --setup first copies the committed revision to
# every worker and installs it there; needed once for each revision.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/spec.sh

REMOTE_PYTHON="${REMOTE_PYTHON:-python3}" # 3.11 or later, on the workers
REMOTE_DIR="${REMOTE_DIR:-s2d_jax}"       # below the login folder

dry_run=0
setup=0
while [[ "${1:-}" == --dry-run || "${1:-}" == --setup ]]; do
  if [[ "$1" == --dry-run ]]; then dry_run=1; else setup=1; fi
  shift
done
if (($# < 2)); then
  echo "usage: WORKDIR=gs://bucket/run $0 [--dry-run] [--setup] NAME ZONE [flags of main]" >&2
  exit 64
fi
name="$1"
zone="$2"
shift 2
require_shared_workdir

# Runs one line of shell on every worker; returns the first exit code that is not 0.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$1"
}

# A bundle keeps the revision, which the manifests record, and needs no access to a remote.
set_up_workers() {
  local bundle=build/s2d_jax.bundle
  run mkdir -p build
  run git bundle create "$bundle" HEAD
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:$REMOTE_DIR.bundle" "--zone=$zone" \
    --worker=all
  on_workers "$(printf '%s' \
    "rm -rf $REMOTE_DIR && git clone -q $REMOTE_DIR.bundle $REMOTE_DIR && cd $REMOTE_DIR && " \
    "$REMOTE_PYTHON -m venv .venv && " \
    ".venv/bin/python -m pip install -q -e \".[tpu,gcs]\" -c constraints.txt")"
}

if ((setup)); then set_up_workers; fi
PYTHON=.venv/bin/python
set_job --distributed "$@"
retry on_workers "cd $REMOTE_DIR && $(quote "${JOB[@]}")"
