#!/usr/bin/env bash
# Runs every check on a bare machine: makes a virtual environment, installs, then ruff, mypy and pytest.
#
#   bash tests/run.sh                      everything
#   bash tests/run.sh -m "not slow" -x     arguments go to pytest
#
# Needs python3 (3.9-3.13, with venv and, as fairseq has no wheels, a C++ compiler) and PyPI. PYTHON names
# another Python, VENV another environment folder, LINT=0 leaves out ruff and mypy. An environment is used
# again until its requirements change.
# Where pip would fetch torch with CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has it without.
set -euo pipefail
cwd=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '\n== %s\n' "$*"; }

python=${PYTHON:-python3}
venv=${VENV:-$PWD/tests/.venv}
[[ $venv = /* ]] || venv=$cwd/$venv
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

case $version in
    # The oldest torch, and what goes with it.
    3.9 | 3.10) requirements=('torch==1.12.1' 'torchaudio==0.12.1' 'numpy<1.24' 'transformers<4.31') ;;
    *) requirements=(-c tests/constraints.txt) ;;
esac

# The stamp is written last: an interrupted installation starts again.
stamp=$({ echo "$PWD $version ${requirements[*]}" && cat setup.py tests/constraints.txt; } | cksum)
if [ "$(cat "$venv/installed" 2>/dev/null)" = "$stamp" ]; then
    say "environment $venv is up to date"
else
    say "making the environment $venv with Python $version (about 2 minutes)"
    "$python" -m venv --clear "$venv"
    pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
    pip install 'pip<24.1'
    pip install "${requirements[@]}" -e '.[tests]'
    # Its metadata ask for an omegaconf that fairseq cannot use; what the tests import of it needs no more than this.
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
python -m pytest "$@"
