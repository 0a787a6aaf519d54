#!/usr/bin/env bash
# Runs examples/librispeech/submit.sh and the run configs on a real one-node Slurm, which it starts and stops, and
# disturbs them: requeues, preempts, cancels, signals, and exceeds time limits. Four to eight minutes on 2 CPU cores.
#
#   bash tests/slurm/run.sh
#
# Uses the environment of tests/run.sh (VENV names another). Needs root, like Slurm's daemons, and Debian's packages
# slurm-wlm and munge, which it installs if missing. Exit code 77: it cannot run here, without root, or with neither
# Slurm nor apt-get. KEEP=1 keeps the folder with all logs; so does a failure.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }
cwd=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=tests/slurm/cluster.sh
. "$here/cluster.sh"

venv=${VENV:-$repo/tests/.venv}
[[ $venv = /* ]] || venv=$cwd/$venv
if [ ! -x "$venv/bin/fairseq-hydra-train" ]; then
    echo "$venv: no environment of tests/run.sh there; run that first, or name one with VENV" >&2
    exit 2
fi
export PATH=$venv/bin:$PATH:/usr/sbin OMP_NUM_THREADS=1

install_slurm() {
    if command -v slurmctld slurmd munged sbatch >/dev/null; then return; fi
    if ! command -v apt-get >/dev/null; then
        echo "SKIPPED: no Slurm here, and no apt-get to install slurm-wlm and munge with"
        exit 77
    fi
    echo "installing slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$work/apt.log" 2>&1; then
        tail -n 20 "$work/apt.log" >&2
        echo "apt-get could not install slurm-wlm and munge; install them, then run this again" >&2
        exit 1
    fi
}

failures=0
check() {  # what, command ...
    local what=$1
    shift
    if "$@"; then
        printf 'PASS  %s  (%d s)\n' "$what" "$SECONDS"
    else
        printf 'FAIL  %s  (%d s)\n' "$what" "$SECONDS"
        failures=$((failures + 1))
    fi
}

finish() {
    local status=$?
    trap - EXIT
    if [ -n "${launcher:-}" ]; then kill "$launcher" 2>/dev/null || true; fi
    stop_cluster
    if [ "$status" != 0 ] || [ "$failures" != 0 ]; then
        tail -n 15 "$work"/*/logs/*.log "$work"/*.log 2>/dev/null || true
        echo "everything is in $work"
    elif [ "${KEEP:-0}" = 1 ]; then
        echo "everything is in $work"
    else
        rm -rf "$work"
    fi
    exit "$status"
}

if [ "$(id -u)" != 0 ]; then
    echo "SKIPPED: Slurm's daemons need root"
    exit 77
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/skill_slurm.XXXXXX")
chmod 755 "$work"  # munged wants its folder readable
trap finish EXIT
trap 'exit 130' INT TERM
install_slurm
start_cluster "$work/cluster" || { echo "Slurm does not start" >&2; exit 1; }
echo "Slurm $(sinfo --version | cut -d' ' -f2) is up  ($SECONDS s)"

# The tiny recipe, shortened
updates1=40 updates2=20
schedule=lr_scheduler.warmup_updates=5
small=(--set checkpoint.save_interval_updates=10 --set dataset.validate_interval_updates=0 --set common.log_interval=1)
small+=(--set dataset.num_workers=1)
for group in default gates multipliers; do small+=(--set-stage1 "optimizer.groups.$group.$schedule"); done
small+=(--set-stage1 criterion.sparsity_warmup=15 --set-stage1 "optimization.max_update=$updates1")
small+=(--set-stage2 "$schedule" --set-stage2 "optimization.max_update=$updates2")

submit() {  # folder, options ...
    local out=$work/$1
    shift
    bash "$repo/examples/librispeech/submit.sh" --data "$repo/examples/tiny/data" \
        --teacher "$repo/examples/tiny/teacher/teacher.safetensors" --out "$out" --config tiny --run-config cpu \
        --cluster --max-seconds=20 "${small[@]}" "$@"
}

job_of() {  # folder, step: the id of its job in the queue
    squeue --noheader --name="skill-$2" --format='%i %Z' | awk -v out="$work/$1" '$2 == out { print $1 }'
}

updates() {  # folder of a run: every update that it made, in order
    sed -n '/train_inner/s/.* num_updates=\([0-9]*\),.*/\1/p' "$1/hydra_train.log" 2>/dev/null
}

is_at() { [ "$(updates "$1" | tail -n 1)" -ge "$2" ] 2>/dev/null; }  # folder of a run, number of updates
each_once() { [ "$(updates "$1")" = "$(seq "$2")" ]; }               # folder of a run, number of updates
exists() { [ -e "$1" ]; }
is_gone() { [ -z "$(job_of "$1" "$2")" ]; }                          # folder, step
has() { grep -q -e "$2" "$1"; }                                      # file, pattern
state_of() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
restarts_of() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }
is() { [ "$1" = "$2" ] || { echo "      found $1, expected $2"; false; }; }

same_student() {  # two files: the same tensors, bit for bit
    python - "$1" "$2" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file

one, other = map(load_file, sys.argv[1:])
assert one.keys() == other.keys() and len(one) > 50, (len(one), len(other))
for name, tensor in one.items():
    assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
    assert torch.equal(tensor, other[name]), f"{name}: differs by {(tensor - other[name]).abs().max()}"
PYTHON
}

# Two runs in parallel, the second disturbed
submit plain >"$work/plain.log"
submit disturbed >"$work/disturbed.log"
check "four jobs are submitted" is "$(grep -c submitted "$work/disturbed.log")" 4
submit disturbed >"$work/again.log"
check "they are not submitted twice" is "$(grep -c 'in the queue' "$work/again.log") $(squeue --noheader | wc -l)" "4 8"

run=$work/disturbed/stage1
wait_for 180 is_at "$run" 13 || true
job=$(job_of disturbed stage1)
scontrol requeue "$job"
wait_for 180 exists "$run/done" || true
check "stage 1, requeued in the middle, ends" exists "$run/done"
check "it was restarted once" is "$(restarts_of "$job")" 1
check "it made every update once" each_once "$run" "$updates1"

run=$work/disturbed/stage2
wait_for 180 is_at "$run" 7 || true
job=$(job_of disturbed stage2)
scancel "$job"
wait_for 60 is_gone disturbed stage2 || true
wait_for 60 is_gone disturbed export || true
check "stage 2, cancelled in the middle, stays cancelled" is "$(state_of "$job") $(job_of disturbed stage2)" "CANCELLED "
check "so does the export that waited for it" is_gone disturbed export
submit disturbed >"$work/after_cancel.log"
check "submitted again: what is missing" is "$(sed 's/job [0-9]* //' "$work/after_cancel.log" | tr '\n' ' ')" \
    "cluster: done stage1: done stage2: submitted export: submitted "
for folder in plain disturbed; do wait_for 240 exists "$work/$folder/student.safetensors" || true; done
check "stage 2 made every update once" each_once "$run" "$updates2"
check "the student is that of the undisturbed run, bit for bit" \
    same_student "$work/plain/student.safetensors" "$work/disturbed/student.safetensors"
wait_for 30 is_gone disturbed export || true
submit disturbed >"$work/when_done.log"
check "submitted when all is done: nothing" is "$(grep -c ': done' "$work/when_done.log") $(squeue --noheader | wc -l)" "4 0"

# Two processes, one task each, as on GPUs. Every 30 s Slurm looks for jobs to warn: 29 to 59 s after the start, of the
# minute that the job has.
two=(--run-config slurm_1node --groups "$work/plain/clusters/groups.yaml" --set common.cpu=true)
two+=(--set distributed_training.distributed_world_size=2 --set distributed_training.distributed_backend=gloo)
for option in --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=0 --mem=2G; do two+=(--sbatch "$option"); done
two+=(--sbatch-stage1 --time=1 --sbatch-stage1 --signal=USR1@1 --set-stage1 optimization.max_update=4000)
submit two "${two[@]}" >"$work/two.log"
job=$(job_of two stage1)
run=$work/two/stage1
goes_on() {  # how often it was restarted by now: it is ahead of where it then was
    was_restarted() { [ "$(restarts_of "$job")" -ge "$1" ]; }
    wait_for 120 was_restarted "$1" || true
    local before
    before=$(updates "$run" | tail -n 1)
    scontrol update "JobId=$job" TimeLimit=60
    wait_for 120 is_at "$run" $((before + 3)) || true
    is "$(restarts_of "$job")" "$1" && is_at "$run" $((before + 3))
}
check "two tasks, their time nearly over, go back into the queue, and on" goes_on 1
check "the world has two ranks" has "$work/two/logs/stage1.log" "distributed init (rank 1)"
sbatch --quiet --partition=urgent --cpus-per-task=2 --output="$work/urgent.log" --wrap "sleep 1"
check "two tasks, preempted by a more urgent job, go back into the queue, and on" goes_on 2
check "both times by themselves" is "$(grep -c 'goes back into the queue' "$work/two/logs/stage1.log")" 2
made=$(updates "$run")
check "and have made every update once" is "$made" "$(seq "$(tail -n 1 <<<"$made")")"
scontrol update "NodeName=$(hostname -s)" State=DOWN Reason=test
scontrol update "NodeName=$(hostname -s)" State=RESUME
check "two tasks, their node lost, go back into the queue, and on" goes_on 3
scancel "$job"
queue_is_empty() { [ -z "$(squeue --noheader)" ]; }
wait_for 60 queue_is_empty || true
check "cancelled, they stay cancelled, and what waited is gone" is "$(state_of "$job") $(squeue --noheader | wc -l)" \
    "CANCELLED 0"

# hydra's submitit launcher, preempted by submitit's own signal
run=$work/submitit/0
fairseq-hydra-train -m --config-dir "$repo/config/distill" --config-name tiny hydra/launcher=submitit_slurm +run=cpu \
    "task.data=$repo/examples/tiny/data" "task.teacher=$repo/examples/tiny/teacher/teacher.safetensors" \
    "criterion.groups_file=$work/plain/clusters/groups.yaml" "hydra.run.dir=$work/submitit" optimization.max_update=30 \
    optimizer.groups.{default,gates,multipliers}."$schedule" criterion.sparsity_warmup=15 common.log_interval=1 \
    >"$work/submitit.log" 2>&1 &
launcher=$!
wait_for 180 is_at "$run" 8 || true
scancel --signal=USR2 "$(squeue --noheader --name=tiny --format=%i)"
status=0
wait "$launcher" || status=$?
launcher=
check "a run by submitit, preempted in the middle, ends" is "$status" 0
check "submitit requeued it" has "$work/submitit/.submitit/"*/*_0_log.out "Requeued job"
check "it made every update once" each_once "$run" 30

printf '%d s, %d failed\n' "$SECONDS" "$failures"
if [ "$failures" != 0 ]; then exit 1; fi
