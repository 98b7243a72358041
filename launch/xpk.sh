#!/usr/bin/env bash
# The job as an xpk workload on a GKE cluster of TPUs.
#   WORKDIR=gs://bucket/run IMAGE=... bash launch/xpk.sh [--dry-run] CLUSTER NAME TPU_TYPE [flags]
# IMAGE holds this repository as its working folder, installed with '.[tpu,gcs]' (launch/README.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/spec.sh

read_dry_run "$@"
shift "$dry_run"
if (($# < 3)) || [[ -z "${IMAGE:-}" ]]; then
  echo "usage: WORKDIR=gs://bucket/run IMAGE=image $0 [--dry-run] CLUSTER NAME TPU_TYPE [flags]" >&2
  exit 64
fi
cluster="$1"
name="$2"
tpu_type="$3"
shift 3
require_shared_workdir

set_job --distributed "$@"
# `exec`, so that the signal which xpk passes on reaches the job and not a shell around it.
run xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$tpu_type" \
  "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" "--restart-on-exit-codes=$RETRY_CODE" \
  --termination-grace-period-seconds=300 "--command=exec $(quote "${JOB[@]}")"
