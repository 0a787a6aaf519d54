#!/usr/bin/env bash
# The whole run as four Slurm jobs, each waiting for the previous one: cluster, stage 1, stage 2, export.
#
#   bash submit.sh --data DIR --teacher FILE --out DIR [options]
#
#   --data DIR            manifests of skill-manifest: train.tsv, valid.tsv
#   --teacher FILE        file or folder for skill-cluster; repeat it for several teachers: criterion.groups names their
#                         layers as 1/4, and the student starts as a copy of the first
#   --out DIR             gets clusters/, stage1/, stage2/, student.safetensors and logs/; must be visible on every node
#   --config NAME         of config/distill and config/final (default wavlm_base_plus_librispeech)
#   --final-config NAME   of config/final, if its name differs
#   --run-config NAME     of config/run: slurm_1gpu, slurm_1node (default), slurm_multinode, cpu; sets job resources
#   --groups FILE         existing groups of layers, skips clustering; "none": the config has its own
#   --cluster ARG         for skill-cluster, as in --cluster --max-seconds=600; may be given again
#   --set KEY=VALUE       hydra override of both stages; may be given again; also --set-stage1, --set-stage2
#   --sbatch ARG          for sbatch, in every step, as in --sbatch --partition=gpu; may be given again; also
#                         --sbatch-cluster, --sbatch-stage1, --sbatch-stage2, --sbatch-export
#   --print               print the sbatch commands, submit nothing
#
# Run the same command again after a failure, or to see the progress: steps that are done or in the queue are not
# submitted again. Jobs inherit this shell's environment: fairseq-hydra-train must be on its PATH. A job that is
# preempted, or comes close to its time limit, saves its state, returns to the queue and resumes; a cancelled job stays
# cancelled, with the jobs that wait for it.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configs=$(cd "$here/../../config" && pwd)
steps=(cluster stage1 stage2 export)

fail() {
    printf 'submit.sh: %s\n' "$*" >&2
    exit 2
}

existing() {  # option, path: its absolute name
    if [ ! -e "$2" ]; then fail "$1: $2: no such file or folder"; fi
    printf '%s/%s\n' "$(cd -- "$(dirname -- "$2")" && pwd)" "$(basename -- "$2")"
}

data='' teacher='' teachers=() out='' groups=''
config=wavlm_base_plus_librispeech final_config='' run_config=slurm_1node print=0
cluster_args=() sets_stage1=() sets_stage2=()
sbatch_cluster=() sbatch_stage1=() sbatch_stage2=() sbatch_export=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit
            ;;
        --print)
            print=1
            shift
            continue
            ;;
        -*) if [ $# -lt 2 ]; then fail "$1: expected a value after it, or an option of --help"; fi ;;
    esac
    case $1 in
        --data) data=$2 ;;
        --teacher) teachers+=("$2") teacher=$2 ;;
        --out) out=$2 ;;
        --config) config=$2 ;;
        --final-config) final_config=$2 ;;
        --run-config) run_config=$2 ;;
        --groups) groups=$2 ;;
        --cluster) cluster_args+=("$2") ;;
        --set) sets_stage1+=("$2") sets_stage2+=("$2") ;;
        --set-stage1) sets_stage1+=("$2") ;;
        --set-stage2) sets_stage2+=("$2") ;;
        --sbatch)
            sbatch_cluster+=("$2") sbatch_stage1+=("$2") sbatch_stage2+=("$2") sbatch_export+=("$2")
            ;;
        --sbatch-cluster) sbatch_cluster+=("$2") ;;
        --sbatch-stage1) sbatch_stage1+=("$2") ;;
        --sbatch-stage2) sbatch_stage2+=("$2") ;;
        --sbatch-export) sbatch_export+=("$2") ;;
        *) fail "$1: no such option; see --help" ;;
    esac
    shift 2
done
final_config=${final_config:-$config}

for option in data teacher out; do
    if [ -z "${!option}" ]; then fail "--$option is missing; see --help"; fi
done
for file in distill/$config final/$final_config run/$run_config; do
    if [ ! -f "$configs/$file.yaml" ]; then
        fail "config/$file.yaml: no such config; there are: $(cd "$configs/${file%/*}" && echo *.yaml)"
    fi
done
case "$data${teachers[*]}$out$groups$configs" in *'${'*) fail "a path holds \${, which hydra takes for a reference; rename it" ;; esac
data=$(existing --data "$data")
existing --data "$data/train.tsv" >/dev/null
for i in "${!teachers[@]}"; do teachers[i]=$(existing --teacher "${teachers[i]}"); done
teacher=${teachers[0]}
if [ "${#teachers[@]}" -gt 1 ]; then
    others=("${teachers[@]:1}")
    cluster_args=("${others[@]/#/--teacher=}" "${cluster_args[@]}")
    printf -v several ",'%s'" "${teachers[@]//\'/\\\'}"
    sets_stage1=("task.teacher=[${several:1}]" "${sets_stage1[@]}")
    sets_stage2=("task.teacher=[${several:1}]" "${sets_stage2[@]}")
fi
case $groups in
    none) groups_file= ;;
    '') groups_file=clusters/groups.yaml ;;
    *) groups_file=$(existing --groups "$groups") ;;
esac
commands=(skill-cluster fairseq-hydra-train skill-export)
if [ "$print" = 0 ]; then commands+=(sbatch squeue scancel); fi
for command in "${commands[@]}"; do
    if [ -z "$(command -v "$command")" ]; then fail "$command: not found; put it on PATH (activate the environment)"; fi
done
if [ "$print" = 0 ]; then mkdir -p -- "$out/logs"; fi
out=$(realpath -m -- "$out")
if [ "$groups_file" = clusters/groups.yaml ]; then groups_file=$out/clusters/groups.yaml; fi

of_run_config() {  # field of hydra.launcher
    awk -v field="$1:" '$1 == field { print $2; exit }' "$configs/run/$run_config.yaml"
}

arguments() {  # step: those of sbatch and of job.sh, into the array command
    local step=$1 gpus device=cpu
    gpus=$(of_run_config gpus_per_node)
    local -n more=sbatch_$step
    command=(
        sbatch --parsable "--job-name=skill-$step" "--chdir=$out" "--output=${out//%/%%}/logs/$step.log" --open-mode=append
        --export=ALL --requeue --kill-on-invalid-dep=yes "--cpus-per-task=$(of_run_config cpus_per_task)"
    )
    case $step in
        stage?)
            command+=(
                "--nodes=$(of_run_config nodes)" "--ntasks-per-node=$(of_run_config tasks_per_node)"
                "--mem=$(of_run_config mem_gb)G" "--time=$(of_run_config timeout_min)"
                "--signal=USR1@$(of_run_config signal_delay_s)"  # for the tasks of srun; the batch shell has no trap
            )
            ;;
        cluster)
            command+=(--nodes=1 --ntasks=1 --time=240)
            if [ "$gpus" -gt 0 ]; then gpus=1 device=cuda; fi
            ;;
        export)
            command+=(--nodes=1 --ntasks=1 --time=60)
            gpus=0
            ;;
    esac
    if [ "$gpus" -gt 0 ]; then command+=("--gpus-per-node=$gpus"); fi
    if [ -n "$previous" ]; then command+=("--dependency=afterok:$previous"); fi
    command+=("${more[@]}" "$here/job.sh" "$step" "$out")
    case $step in
        cluster) command+=("$data" "$teacher" "--device=$device" "${cluster_args[@]}") ;;
        stage1) command+=("$data" "$teacher" "$configs/distill/$config" "$run_config" "$groups_file" "${sets_stage1[@]}") ;;
        stage2) command+=("$data" "$teacher" "$configs/final/$final_config" "$run_config" "$groups_file" "${sets_stage2[@]}") ;;
    esac
}

is_done() {  # step
    case $1 in
        cluster) [ -n "$groups" ] || [ -e "$out/clusters" ] ;;
        stage?) [ -e "$out/$1/done" ] ;;
        export) [ -e "$out/student.safetensors" ] ;;
    esac
}

queued() {  # step: "id state dependency" of its job, once it is known whether a job that ends comes back; or nothing
    local found
    if [ "$print" = 1 ]; then return; fi
    while :; do
        found=$(squeue --noheader --user="$(id -un)" --name="skill-$1" --format='%i %T %E %Z' |
            out=$out awk 'substr($0, length($0) - length(ENVIRON["out"])) == " " ENVIRON["out"] { print $1, $2, $3; exit }')
        if [[ $found != *' COMPLETING '* ]]; then break; fi
        sleep 1
    done
    printf '%s\n' "$found"
}

previous=
for step in "${steps[@]}"; do
    if is_done "$step"; then
        if [ "$step" != cluster ] || [ -z "$groups" ]; then echo "$step: done"; fi
        previous=
        continue
    fi
    job=$(queued "$step")
    read -r id state dependency <<<"$job"
    if [ -n "$id" ] && [ "$state" = PENDING ] && [ -n "$previous" ] && [[ $dependency != "afterok:$previous("* ]]; then
        scancel "$id"  # it waits for a job that is gone
        id=
    fi
    if [ -n "$id" ]; then
        echo "$step: job $id is in the queue ($state)"
        previous=$id
        continue
    fi
    arguments "$step"
    if [ "$print" = 1 ]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        previous="<$step>"
    else
        id=$("${command[@]}")
        previous=${id%%;*}  # a cluster's name may follow
        echo "$step: job $previous submitted"
    fi
done
if is_done export; then echo "the student: $out/student.safetensors"; fi
