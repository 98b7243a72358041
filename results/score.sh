# Sourced by the scripts that choose learning rates, which set CONFIG and WORKDIR.
PYTHON="${PYTHON:-python}"

# score ARM FLAGS...: the scores of a run of ARM with those flags. The report lists every arm of a
# workdir: those of earlier calls are forgotten, their stages and scores kept.
# The first table of a report has the scores; a later one may name the arm too.
score() {
  local arm="$1"
  shift
  rm -rf "$WORKDIR/arms"
  "$PYTHON" -m s2d_jax.main --config="$CONFIG" --workdir="$WORKDIR" \
    --config.arms="$arm" --config.evals.test.split=validation --config.probe.problems=0 \
    "$@" 2>> "$WORKDIR.log" |
    grep -F "| ${ROW:-$arm} |" | sed -n 1p | cut -d '|' -f 4,5,8
}
