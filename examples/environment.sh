# Sourced by the examples' run.sh: creates their environment, in a folder of any name.

make_environment() {  # folder, extras to install, such as [plots,probe], or ""
    local repo link python=${PYTHON:-python3} constraints=constraints.txt
    if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = 3.10 ]; then
        constraints=constraints-oldest.txt  # the other's packages need a later Python
    fi
    repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    rm -rf "$1"
    mkdir -p "$(dirname "$1")"
    link=$(mktemp -d)  # by its own name setuptools takes { and $ in it for variables
    ln -s "$(dirname "$1")" "$link/to"
    set -- "$link/to/$(basename "$1")" "$2"
    "$python" -m venv "$1"
    _pip "$1" 'pip<24.1'
    (cd "$repo" && _pip "$1" --constraint "tests/$constraints" ".$2")
    rm -r "$link"
}

_pip() {  # folder, what to install
    "$1/bin/python" -m pip --quiet --disable-pip-version-check install "${@:2}" 2>&1 |
        { grep -v -e WARNING -e DEPRECATION || true; }
}

tool() {  # a command of the environment "$venv": the first line of its file cannot hold every folder's name
    "$venv/bin/python" -c 'import sys; from importlib.metadata import entry_points
sys.argv, sys.path = sys.argv[1:], [folder for folder in sys.path if folder]
(command,) = {entry for entry in entry_points(group="console_scripts") if entry.name == sys.argv[0]}
sys.exit(command.load()())' "$@"
}
