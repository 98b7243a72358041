#!/usr/bin/env bash
# The variants of results/composition/variants.py, each against its controls, and their tables:
#   bash results/composition/study.sh [STUDY ...]    by default all studies
# Started again, it skips what is finished. PYTHON and WORKDIR choose the interpreter and the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python}"
WORKDIR="${WORKDIR:-runs/methods}"

mkdir -p "$WORKDIR"
variants() {
  "$PYTHON" -c 'import sys; from results.composition.variants import VARIANTS
print(*(name for name, one in VARIANTS.items() if not sys.argv[1:] or one.study in sys.argv[1:]))' "$@"
}
for variant in $(variants "$@"); do
  "$PYTHON" -m s2d_jax.main --config="results/composition/variants.py:variant=$variant" --workdir="$WORKDIR" \
    > /dev/null
done
"$PYTHON" results/composition/unnormalised.py --workdir "$WORKDIR-unnormalised"
"$PYTHON" results/composition/compare.py "$WORKDIR"
