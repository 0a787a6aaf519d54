#!/usr/bin/env bash
# One step of a run that submit.sh submits. Also works outside of Slurm, without srun.
#
#   job.sh cluster OUT DATA TEACHER [options of skill-cluster ...]            OUT/clusters
#   job.sh stage1  OUT DATA TEACHER CONFIG RUN_CONFIG GROUPS [overrides ...]  OUT/stage1
#   job.sh stage2  OUT DATA TEACHER CONFIG RUN_CONFIG GROUPS [overrides ...]  OUT/stage2
#   job.sh export  OUT                                                        OUT/student.safetensors
#
# A step whose result exists does nothing; results are atomic: a folder is renamed when it is complete, a stage gets the
# file "done". A stopped stage resumes. Paths are absolute; the start-up hook quotes them for hydra. CONFIG is a name
# in config/distill (stage1) or config/final (stage2) of this clone, or the path of a config without ".yaml".
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }

checkpoint=checkpoints/checkpoint_last.pt
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)  # within a Slurm job this is Slurm's own copy

cluster() {  # out, data, teacher, options ...
    local out=$1 data=$2 teacher=$3
    shift 3
    if [ -e "$out/clusters" ]; then return; fi
    rm -rf "$out/clusters.partial"
    skill-cluster --teacher "$teacher" --manifest "$data/train.tsv" --out "$out/clusters.partial" "$@"
    mv "$out/clusters.partial" "$out/clusters"
}

train() {  # folder, config folder, data, teacher, config, run config, groups file or "", overrides ...
    local run=$1 stage=$2 data=$3 teacher=$4 config=$5 run_config=$6 groups=$7 launch=() status=0
    shift 7
    if [ -e "$run/done" ]; then return; fi
    mkdir -p "$run"
    if [[ $config != */* ]]; then config=$(cd "$here/../../config/$stage" && pwd)/$config; fi
    if [ -n "$groups" ]; then set -- "criterion.groups_file=$groups" "$@"; fi
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        # A failing task ends the others, which would wait for it. Since Slurm 22.05 srun forgets the job's CPUs.
        launch=(srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
        if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then  # two jobs on one node must not meet
            set -- "distributed_training.distributed_port=$((20000 + SLURM_JOB_ID % 20000))" "$@"
        fi
    fi
    rm -f "$run/preempted"
    SKILL_PREEMPTED_FILE=$run/preempted "${launch[@]}" \
        fairseq-hydra-train --config-dir "${config%/*}" --config-name "${config##*/}" "+run=$run_config" \
        "task.data=$data" "task.teacher=$teacher" "hydra.run.dir=$run" \
        checkpoint.save_dir=checkpoints "$@" || status=$?
    case $status in
        0)
            # srun also returns 0 for a lost node.
            if ! tail -n 3 "$run/hydra_train.log" | grep -q 'done training in'; then
                echo "$run: ended before its training was done" >&2
                return 1
            fi
            date >"$run/done.partial" && mv "$run/done.partial" "$run/done"
            ;;
        75 | 138 | 140) go_on_later ;;  # the last two: SIGUSR1 or SIGUSR2 before Python was up
        # srun's code if one task, after stopping, had the others ended: it was a request to stop only if rank 0 says
        # so. A failing task ends the others in the same way.
        *) if [ -e "$run/preempted" ]; then go_on_later; else return "$status"; fi ;;
    esac
}

go_on_later() {  # the training was told to stop, has saved its state, and is to be started again
    # Slurm itself ends a job that is cancelled, requeued or out of time: such a job is COMPLETING, and Slurm decides
    # whether it comes back. One that is still RUNNING was only warned.
    if [ "$(squeue --noheader --jobs="${SLURM_JOB_ID:-none}" --format=%T 2>/dev/null)" = RUNNING ]; then
        echo "stopped; goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60  # which this shell does not live to see
    fi
    echo "stopped; the same command goes on from here" >&2
    return 75
}

step=$1
out=$2
shift 2
cd -- "$out"
case $step in
    cluster) cluster "$out" "$@" ;;
    stage1) train "$out/stage1" distill "$@" ;;
    stage2) train "$out/stage2" final "$@" "model.init_from=$out/stage1/$checkpoint" ;;
    export) [ -e student.safetensors ] || skill-export "$out/stage2/$checkpoint" student.safetensors ;;
    *)
        echo "$step: no such step; expected cluster, stage1, stage2 or export" >&2
        exit 2
        ;;
esac
