#!/usr/bin/env bash
# The learning rates of configs/composition.py, chosen on `validation`: one row of the recipe after
# the other, with every seed 0, by avg@16. A row has one rate in every arm; those of the distilling
# rows are chosen with the teacher after GRPO.
#   bash results/composition/choose.sh  (prints the table of choice.md)
# Stages are shared through runs/choice-composition, so a rate is trained once; about 25 minutes on
# two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
CONFIG=configs/composition.py
WORKDIR="${WORKDIR:-runs/choice-composition}"
source results/score.sh

mkdir -p "$(dirname "$WORKDIR")"
echo "| row | learning rate | greedy | avg@16 | pass@16 |"
echo "|---|---|---|---|---|"
for rate in 1e-4 2e-4 3e-4 5e-4 1e-3; do
  echo "| student_grpo (cold_grpo) | $rate |$(score cold_grpo \
    --config.stages.student_grpo.optim.lr="$rate")|"
done
for rate in 1e-4 3e-4 1e-3; do
  echo "| student_grpo (half_bridge_grpo_2h) | $rate |$(score half_bridge_grpo_2h \
    --config.stages.student_grpo.optim.lr="$rate")|"
done
for rate in 5e-4 1e-3 2e-3; do
  echo "| teacher_sft | $rate |$(ROW="teacher after teacher_sft (all)" \
    score untrained,sft_teacher_bridge --config.stages.teacher_sft.optim.lr="$rate" \
    --config.stages.forward_kl.steps=0 --config.stages.reverse_kl.steps=0)|"
done
for rate in 2e-3 4e-3 8e-3; do
  echo "| sft (sft_only) | $rate |$(score sft_only --config.stages.sft.optim.lr="$rate")|"
done
for rates in "4e-3 2e-3" "4e-3 1e-3" "4e-3 4e-3" "2e-3 2e-3" "8e-3 2e-3"; do
  read -r warmup opd <<< "$rates"
  echo "| forward_kl, reverse_kl (bridge) | $warmup, $opd |$(score bridge \
    --config.stages.forward_kl.optim.lr="$warmup" --config.stages.reverse_kl.optim.lr="$opd")|"
done
for rate in 1e-3 2e-3 4e-3; do
  echo "| reverse_kl (opd_only) | $rate |$(score opd_only \
    --config.stages.reverse_kl.optim.lr="$rate")|"
done
