#!/usr/bin/env bash
# Measures this code on one accelerator for at most eight minutes and prints a table: README.md says
# what its lines mean. PYTHON names another interpreter, SECONDS_LEFT another limit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.accelerator "$@"
