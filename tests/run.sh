#!/usr/bin/env bash
# Runs every check on a bare machine: creates a virtual environment, installs, then runs ruff, mypy and pytest.
#
#   bash tests/run.sh                      everything except tests marked nightly
#   bash tests/run.sh -m "not slow" -x     arguments go to pytest
#
# Needs python3 (3.10-3.13, with venv and, as fairseq has no wheels, a C++ compiler) and PyPI. PYTHON names
# another Python, VENV another environment folder, LINT=0 skips ruff and mypy. WORKERS is the number of
# processes that pytest uses (one for each processor; 0 keeps it in one). An environment is reused until its
# requirements change.
# If pip would download torch with CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives a CPU build.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }
cwd=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '\n== %s\n' "$*"; }

python=${PYTHON:-python3}
venv=${VENV:-$PWD/tests/.venv}
[[ $venv = /* ]] || venv=$cwd/$venv
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

constraints=tests/constraints.txt
if [ "$version" = 3.10 ]; then constraints=tests/constraints-oldest.txt; fi

# The stamp is written last: an interrupted installation starts again.
stamp=$({ echo "$PWD $version" && cat setup.py "$constraints"; } | cksum)
if [ "$(cat "$venv/installed" 2>/dev/null)" = "$stamp" ]; then
    say "environment $venv is up to date"
else
    say "making the environment $venv with Python $version (about 2 minutes)"
    "$python" -m venv --clear "$venv"
    pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
    pip install 'pip<24.1'
    pip install -c "$constraints" -e '.[tests]'
    # Its metadata require an omegaconf that fairseq cannot use; the tests need only this much of it.
    pip install --no-deps s3prl==0.4.18
    printf '%s\n' "$stamp" >"$venv/installed"
fi
export PATH="$venv/bin:$PATH"

if [ "${LINT:-1}" = 1 ]; then
    say ruff
    ruff check .
    say mypy
    mypy skill_fairseq setup.py
fi
say pytest
# Tests of a file share expensive fixtures, and therefore a process.
python -m pytest -n "${WORKERS:-auto}" --dist loadfile --no-loadscope-reorder "$@"
