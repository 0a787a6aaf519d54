#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in at most 8 minutes: one JSON, one table.
#
#   bash tests/gpu/run.sh OUT                     on the first CUDA device; Base+ shapes, 156 s batches, bfloat16
#   bash tests/gpu/run.sh OUT --device cpu        the same steps on a CPU with small shapes, to try the script itself
#
# OUT is created and gets results.json, table.md and a log of each step. Needs an environment with the package and its
# extras hf (tests/run.sh makes one: PATH=$PWD/tests/.venv/bin:$PATH). Exit code 1: a check or a step failed.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }
if [ $# -lt 1 ]; then sed -n '2,9p' "$0"; exit 2; fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD:$PWD/tests/helpers:$PWD/tests/gpu${PYTHONPATH:+:$PYTHONPATH}
exec python tests/gpu/steps.py "$out" "$@"
