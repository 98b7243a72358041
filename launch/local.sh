#!/usr/bin/env bash
# The README's job on this machine. Flags are passed on to main.
#   bash launch/local.sh [--dry-run] [--config.arms=bridge ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/spec.sh

dry_run=0
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi

set_job "$@"
if ((dry_run)); then
  quote "${JOB[@]}"
  exit
fi
exec "${JOB[@]}"
