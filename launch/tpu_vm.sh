#!/usr/bin/env bash
# Runs the job on every worker of a TPU slice, joined by jax.distributed, and starts it again while
# it exits with a code of a retry. Ctrl-C here, or SIGTERM, stops it once it has saved.
#   WORKDIR=gs://bucket/run bash launch/tpu_vm.sh [--dry-run] [--setup] NAME ZONE [flags of main]
# --dry-run prints the exact commands. --setup installs the committed revision on the workers first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/spec.sh
REMOTE_PYTHON="${REMOTE_PYTHON:-python3}" # 3.11 or later, on the workers
REMOTE_DIR="${REMOTE_DIR:-s2d_jax}"       # below the login folder
dry_run=0 setup=0
while [[ "${1:-}" == --dry-run || "${1:-}" == --setup ]]; do
  if [[ "$1" == --dry-run ]]; then dry_run=1; else setup=1; fi && shift
done
if (($# < 2)); then
  echo "usage: WORKDIR=gs://bucket/run $0 [--dry-run] [--setup] NAME ZONE [flags of main]" >&2
  exit 64
fi
name="$1" flags=("--zone=$2" --worker=all)
shift 2
require_shared_workdir

# Runs one line of bash on every worker; returns the first exit code that is not 0.
on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${flags[@]}" "--command=$1"; }

# A bundle keeps the revision, which the manifests record, and needs no access to a remote.
set_up_workers() {
  run mkdir -p build
  run git bundle create build/s2d_jax.bundle HEAD
  run gcloud compute tpus tpu-vm scp build/s2d_jax.bundle "$name:$REMOTE_DIR.bundle" "${flags[@]}"
  on_workers "rm -rf $REMOTE_DIR && \
git -c advice.detachedHead=false clone -q $REMOTE_DIR.bundle $REMOTE_DIR && \
cd $REMOTE_DIR && $REMOTE_PYTHON -m venv .venv && \
.venv/bin/python -m pip install -q -e '.[tpu,gcs]' -c constraints.txt"
}

# In its process group gcloud is out of a Ctrl-C's reach: if it ended, the job would go on unseen.
run_job() {
  local code=0
  ((dry_run)) && on_workers "$1" && return
  set -m
  on_workers "$1" </dev/null &
  set +m
  trap stop INT TERM
  wait $! || code=$?
  trap - INT TERM
  return "$code"
}
stop() {
  trap - INT TERM
  echo "Stopping: every worker saves its state. Run the same command again to resume." >&2
  on_workers "pkill -TERM -f '[s]2d_jax.main'" || true
  wait $! || exit $?
  exit 0
}
if ((setup)); then set_up_workers; fi
PYTHON=.venv/bin/python
set_job --distributed "$@"
# `exec`, so that a signal to the command line above finds the job alone and not its shell.
retry run_job "cd $REMOTE_DIR && exec $(quote "${JOB[@]}")"
