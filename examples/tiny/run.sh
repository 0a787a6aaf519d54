#!/usr/bin/env bash
# SKILL in miniature, from a bare machine to a probed student: installs, clusters the small teacher's layers, distils and
# prunes (75 %), shrinks, distils again, exports, probes. README.md beside this file says how long it takes.
#
#   bash examples/tiny/run.sh [OUT]        results go to OUT, by default examples/tiny/out
#
# Finished steps are not repeated: delete OUT, or a part of it, to repeat them. PYTHON chooses the interpreter for the
# environment (default python3; 3.10 to 3.13).
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
mkdir -p "${1:-$here/out}"
out=$(cd "${1:-$here/out}" && pwd)
data=$here/data
venv=$out/venv
# shellcheck source=examples/environment.sh
. "$repo/examples/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a model this small gains nothing from threads, and waits for them
teacher=$here/teacher/teacher.safetensors
began=$SECONDS

step_name=
step() {  # ends the step before, and says how long it took
    if [ -n "$step_name" ]; then
        times+=$(printf '%-40s %4d s' "$step_name" $((SECONDS - step_began)))$'\n'
        printf '(%d s)\n' $((SECONDS - step_began))
    fi
    step_name=$1
    step_began=$SECONDS
    printf '\n== %s\n' "$1"
}
times=
trap 'printf "\nStopped. Finished parts are kept; run the same command again to resume.\n" >&2; exit 130' INT TERM

install() {
    local wanted
    wanted=$("${PYTHON:-python3}" --version && cd "$repo" && { git rev-parse HEAD && git status --porcelain -- skill_fairseq config setup.py; } 2>/dev/null ||
        cat "$repo/setup.py")
    if [ -f "$venv/ready" ] && [ "$(cat "$venv/ready")" = "$wanted" ]; then
        echo "environment is there: $venv"
        return
    fi
    make_environment "$venv" '[plots,probe]'
    tool skill-cluster --help > /dev/null  # the installation works
    printf '%s' "$wanted" > "$venv/ready"
}

progress() {  # fairseq's log on stdin, one short line on the screen
    awk '
        /train_inner/ {
            line = ""
            for (i = 1; i <= NF; i++) {
                split($i, pair, "="); sub(",", "", pair[2])
                if (pair[1] ~ /^(num_updates|distillation_loss|expected_sparsity|target_sparsity|audio_s_per_s)$/)
                    line = line sprintf("  %s %s", pair[1], pair[2])
            }
            printf "\r%s   ", line; fflush()
        }
        END { print "" }'
}

train() {  # folder, config folder, overrides ...
    local run=$1 config=$2
    shift 2
    if [ -f "$run/done" ]; then
        echo "is done: $run"
        return
    fi
    mkdir -p "$run"
    if ! tool fairseq-hydra-train --config-dir "$repo/config/$config" --config-name tiny task.data="$data" task.teacher="$teacher" \
        criterion.groups_file="$out/clusters/groups.yaml" hydra.run.dir="$run" checkpoint.save_dir="$run" "$@" 2>&1 |
        tee "$run/log" | progress; then
        tail -n 20 "$run/log" >&2
        return 1
    fi
    touch "$run/done"
}

step "install"
install
step "cluster the teacher's layers"
if [ ! -f "$out/clusters/groups.yaml" ]; then
    tool skill-cluster --teacher "$teacher" --manifest "$data/train.tsv" --max-seconds 120 --out "$out/clusters"
else
    cat "$out/clusters/groups.yaml"
fi

step "stage 1: distil and prune"
train "$out/stage1" distill

step "shrink"
if [ ! -f "$out/shrunk.safetensors" ]; then
    tool skill-shrink "$out/stage1/checkpoint_last.pt" "$out/shrunk.safetensors"
fi

step "stage 2: distil the shrunk student"
train "$out/stage2" final model.init_from="$out/stage1/checkpoint_last.pt"

step "export"
if [ ! -f "$out/student.safetensors" ]; then
    tool skill-export "$out/stage2/checkpoint_last.pt" "$out/student.safetensors"
fi

step "probe"
if [ ! -f "$out/probe.json" ]; then
    tool skill-probe "teacher=$teacher" "shrunk=$out/shrunk.safetensors" "student=$out/student.safetensors" \
        "random=random:$out/student.safetensors" logmel \
        --task "$data/tasks/digit" --task "$data/tasks/speaker" \
        --plot "$out/probe.png" --json 2>&1 > "$out/probe.json.partial" | tee "$out/probe.txt.partial"
    mv "$out/probe.txt.partial" "$out/probe.txt"
    mv "$out/probe.json.partial" "$out/probe.json"
else
    cat "$out/probe.txt"
fi

step "done"
printf '%s%-40s %4d s\n\n' "$times" "all together" $((SECONDS - began))
printf 'student    %s\ntable      %s\npictures   %s %s\n' "$out/student.safetensors" "$out/probe.txt" \
    "$out/clusters/clusters.png" "$out/probe.png"
