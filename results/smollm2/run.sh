#!/usr/bin/env bash
# SmolLM2-135M-Instruct teaches a student of 27 of its 30 layers, with and without the warmup.
#   bash results/smollm2/run.sh FOLDER/SmolLM2-135M-Instruct WORKDIR [more flags of s2d-jax run]
# Settings that differ from configs/smollm2.py make the run short enough for two CPU cores.
set -euo pipefail
# The paths are those of the caller, who may be in another folder.
teacher="$(realpath "$1")"
workdir="$(realpath -m "$2")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
shift 2
STAGES="--config.stages"

JAX_PLATFORMS=cpu exec s2d-jax run \
  --config="configs/smollm2.py:teacher=$teacher,layers=27,models=$workdir/models" \
  --workdir="$workdir/run" --config.arms=untrained,bridge,opd_only \
  --config.dtype=float32 --config.remat=none \
  $STAGES.teacher_grpo.steps=14 $STAGES.teacher_grpo.prompts=8 \
  $STAGES.teacher_grpo.microbatches=4 $STAGES.teacher_grpo.optim.lr=1.5e-5 \
  $STAGES.forward_kl.steps=24 $STAGES.forward_kl.sampling.samples_per_prompt=1 \
  $STAGES.reverse_kl.steps=12 $STAGES.reverse_kl.sampling.samples_per_prompt=1 \
  $STAGES.reverse_kl.optim.lr=5e-5 \
  --config.evals.test.problems=128 --config.probe.problems=8 --config.probe.prompts=8 "$@"
