#!/usr/bin/env bash
# The learning rates of configs/arithmetic.py, chosen on `validation` before `test` is scored: one
# row of the recipe after the other, each on a grid of factors of two, with every seed 0. A row has
# one rate in every arm; those of the distilling rows are chosen with the teacher after GRPO.
#   bash results/arithmetic/choose.sh  (prints the table of choice.md)
# Stages are shared through runs/choice, so a rate is trained once; about 25 minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python}"
WORKDIR="${WORKDIR:-runs/choice}"
TEACHER="${TEACHER:-1e-3}"   # what the rows of teacher_grpo chose: the bridge's stand on it

# score LABEL ARM FLAGS...: the scores of the row LABEL of a run of ARM with those flags. The report
# lists every arm of a workdir: those of earlier calls are forgotten, their stages and scores kept.
score() {
  local label="$1" arm="$2"
  shift 2
  rm -rf "$WORKDIR/arms"
  "$PYTHON" -m s2d_jax.main --config=configs/arithmetic.py --workdir="$WORKDIR" \
    --config.arms="$arm" --config.evaluation.split=validation "$@" 2>> "$WORKDIR.log" |
    grep -F "| $label |" | tail -n 1 | cut -d '|' -f 4,5,8
}

mkdir -p "$(dirname "$WORKDIR")"
echo "| row | learning rate | greedy | avg@16 | pass@16 |"
echo "|---|---|---|---|---|"
for lr in 2.5e-4 5e-4 1e-3; do
  echo "| teacher_grpo | $lr |$(score "teacher after teacher_grpo (all)" "untrained,bridge" \
    --config.stages.teacher_grpo.optim.lr="$lr" \
    --config.stages.forward_kl.steps=10 --config.stages.reverse_kl.steps=10)|"
done
for lr in 5e-4 1e-3 2e-3 4e-3; do
  echo "| student_grpo (cold_grpo) | $lr |$(score cold_grpo cold_grpo \
    --config.stages.student_grpo.optim.lr="$lr")|"
done
# Not a choice but its control: does cold_grpo lack updates?
echo "| student_grpo (cold_grpo) | 1e-3, 300 updates for 150 |$(score cold_grpo cold_grpo \
  --config.stages.student_grpo.optim.lr=1e-3 --config.stages.student_grpo.steps=300)|"
bridge() {
  echo "| forward_kl, reverse_kl ($1) | $2, $3 |$(score "$1" "$1" \
    --config.stages.teacher_grpo.optim.lr="$TEACHER" \
    --config.stages.forward_kl.optim.lr="$2" --config.stages.reverse_kl.optim.lr="$3")|"
}
for warmup in 4e-3 8e-3 1.6e-2; do
  for opd in 1e-3 2e-3 4e-3; do
    bridge bridge "$warmup" "$opd"
  done
done
# Controls again: the untouched teacher's bridge at the warmup rate chosen.
for opd in 1e-3 2e-3 4e-3; do
  bridge raw_bridge 8e-3 "$opd"
done
