#!/usr/bin/env bash
# The README's job on this machine. Flags are passed on to main.
#   bash launch/local.sh [--dry-run] [--config.arms=bridge ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/spec.sh

read_dry_run "$@"
shift "$dry_run"
set_job "$@"
# The process takes this shell's place, so that a signal reaches it.
if ((dry_run)); then quote "${JOB[@]}"; else exec "${JOB[@]}"; fi
