#!/usr/bin/env bash
# Runs every check on a bare machine: makes a virtual environment, installs, then ruff, mypy and pytest.
#
#   bash tests/run.sh                      everything
#   bash tests/run.sh -m "not slow" -x     arguments go to pytest
#
# Needs python3 (3.9-3.13, with venv and, to build fairseq, a C++ compiler) and PyPI. PYTHON names another
# Python, VENV another environment folder; an environment is kept until its requirements change.
# For a CPU build of torch where pip offers CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cwd=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '\n== %s\n' "$*"; }

PYTHON=${PYTHON:-python3}
VENV=${VENV:-$PWD/tests/.venv}
[[ $VENV = /* ]] || VENV=$cwd/$VENV

# The stamp is written last: an interrupted installation starts again.
stamp=$({ "$PYTHON" --version; pwd; cat setup.py pyproject.toml tests/constraints.txt; } | cksum)
if [ "$(cat "$VENV/installed" 2>/dev/null)" = "$stamp" ]; then
    say "environment $VENV is up to date"
else
    say "making the environment $VENV (about 2 minutes)"
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'pip<24.1'
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e '.[tests]'
    printf '%s\n' "$stamp" >"$VENV/installed"
fi
export PATH="$VENV/bin:$PATH"

say ruff
ruff check .
say mypy
mypy skill_fairseq setup.py
say pytest
python -m pytest "$@"
