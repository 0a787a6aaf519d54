#!/usr/bin/env bash
# Runs the quick tests on every supported Python found, each in an environment of its own; prints a table.
#
#   bash tests/matrix.sh                        3.10 to 3.13, environments in a temporary folder
#   bash tests/matrix.sh FOLDER                 environments, logs and table are kept there, and reused
#   bash tests/matrix.sh FOLDER tests/hook      arguments after the folder go to pytest
#   PYTHONS="3.10 3.13" bash tests/matrix.sh    only these
#
# 3.10 uses the oldest torch, the others that of tests/constraints.txt (see run.sh). If pip offers no CPU build of
# torch, an environment takes about 5 GB. Exit code 77: nothing failed, but a Python is missing.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
versions=${PYTHONS:-3.10 3.11 3.12 3.13}

# The first python3.X that starts and can create environments: on the PATH, then among pyenv's.
find_python() {
    local python check="import sys, ensurepip; assert '%d.%d' % sys.version_info[:2] == '$1'; print(sys.executable)"
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        "$python" -c "$check" 2>/dev/null && return
    done
    return 1
}

row() { printf '%-8s %-16s %-8s %s\n' "$@"; }

try() {  # version, arguments of pytest ...: its row of the table, into a file beside its environment
    local version=$1 venv=$folder/$1 log=$folder/$1.log python result torch numpy
    shift
    if ! python=$(find_python "$version"); then
        row "$version" - - 'no such Python here' >"$folder/$version.row"
        return
    fi
    printf '== Python %s (%s), log %s\n' "$version" "$python" "$log"
    if PYTHON=$python VENV=$venv LINT=0 bash tests/run.sh -m 'not slow' -p no:cacheprovider "$@" >"$log" 2>&1; then
        result=$(tail -n 1 "$log" | tr -d =)
    else
        result="FAILED: $(tail -n 1 "$log" | tr -d =)"
    fi
    printf '== Python %s: %s\n' "$version" "$result"
    read -r torch numpy < <("$venv/bin/python" -c 'import numpy, torch; print(torch.__version__, numpy.__version__)' || echo - -)
    row "$version" "$torch" "$numpy" "$result" >"$folder/$version.row"
}

for version in $versions; do
    rm -f "$folder/$version.row"
    try "$version" "$@"
done
{
    row python torch numpy result
    for version in $versions; do cat "$folder/$version.row"; done
} >"$folder/table.txt"
printf '\n'
cat "$folder/table.txt"
if grep -q FAILED "$folder/table.txt"; then exit 1; fi
if grep -q 'no such Python' "$folder/table.txt"; then exit 77; fi
