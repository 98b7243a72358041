#!/usr/bin/env bash
# The learning rates of configs/arithmetic.py, chosen on `validation` before `test` is scored: one
# row of the recipe after the other, with every seed 0. A row has one rate in every arm; those of
# the distilling rows are chosen with the teacher after GRPO.
#   bash results/arithmetic/choose.sh  (prints the last table of choice.md)
# Stages are shared through runs/choice, so a rate is trained once; about 10 minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
CONFIG=configs/arithmetic.py
WORKDIR="${WORKDIR:-runs/choice}"
source results/score.sh

# teacher_sft RATE: the teacher alone, of an arm whose bridge has no steps
teacher_sft() {
  echo "| teacher_sft | $1 |$(ROW="teacher after teacher_sft (all)" \
    score untrained,sft_teacher_bridge --config.stages.teacher_sft.optim.lr="$1" \
    --config.stages.forward_kl.steps=0 --config.stages.reverse_kl.steps=0)|"
}

# sft RATE
sft() {
  echo "| sft (sft_only) | $1 |$(score sft_only --config.stages.sft.optim.lr="$1")|"
}

# grpo RATE MINIBATCHES
grpo() {
  echo "| student_grpo (cold_grpo), $2 minibatches | $1 |$(score cold_grpo \
    --config.stages.student_grpo.optim.lr="$1" --config.stages.student_grpo.minibatches="$2")|"
}

# bridge ARM WARMUP-RATE OPD-RATE
bridge() {
  echo "| forward_kl, reverse_kl ($1) | $2, $3 |$(score "$1" \
    --config.stages.forward_kl.optim.lr="$2" --config.stages.reverse_kl.optim.lr="$3")|"
}

mkdir -p "$(dirname "$WORKDIR")"
echo "| row | learning rate | greedy | avg@16 | pass@16 |"
echo "|---|---|---|---|---|"
grpo 5e-4 4
grpo 1e-3 2
grpo 1e-3 4
bridge bridge 4e-3 2e-3
bridge bridge 4e-3 1e-3
bridge bridge 2e-3 1e-3
for rate in 5e-4 1e-3 2e-3 4e-3; do teacher_sft "$rate"; done
for rate in 2e-3 4e-3 8e-3; do sft "$rate"; done
