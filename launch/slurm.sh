#!/usr/bin/env bash
# The job on a Slurm allocation, one process to a node, joined by jax.distributed.
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh [flags of main ...]
#   bash launch/slurm.sh --dry-run [flags of main ...]    prints the command and runs nothing
# Submit from the repository's root, with WORKDIR on a file system that all nodes share.
#SBATCH --job-name=s2d_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail
# sbatch runs a copy of this file from elsewhere; SLURM_SUBMIT_DIR is where it was submitted.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source launch/spec.sh

dry_run=0
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi

set_job --distributed "$@"
command=(srun --kill-on-bad-exit=1 "${JOB[@]}")
if ((dry_run)); then
  quote "${command[@]}"
  exit
fi

# The allocation is about to end, so the retry code asks for a new one: no loop inside this one.
code=0
"${command[@]}" || code=$?
if ((code == RETRY_CODE && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
