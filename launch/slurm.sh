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

read_dry_run "$@"
shift "$dry_run"
set_job --distributed "$@"
code=0
# A signal to all of the allocation's processes reaches this shell too, which waits for srun's code.
trap : TERM
# The first process to end may leave others that still save: they have 120 s, with a fault as well.
run srun --kill-on-bad-exit=0 --wait=120 "${JOB[@]}" || code=$?
# A job stopped by the end of its allocation needs a new one, so there is no loop in this one.
if is_retried "$code" && ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
