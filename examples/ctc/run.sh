#!/usr/bin/env bash
# From a student to a word error rate: labels, fine-tuning with fairseq's hubert_ctc on letters and with wav2vec_ctc on
# SentencePiece pieces, decoding with fairseq's Viterbi. About four minutes of CPU time, after examples/tiny/run.sh.
#
#   bash examples/ctc/run.sh [OUT [STUDENT]]
#
# OUT gets the results, by default examples/ctc/out. STUDENT is a checkpoint of task skill_distillation; by default that
# of examples/tiny/run.sh, which is run first. The words are the spoken digits in examples/tiny/data: two of their
# speakers are in no training data. Finished steps are not repeated: delete OUT, or a part of it, to repeat them. PYTHON
# chooses the interpreter for the environment (default python3).
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ${1:-} = -h || ${1:-} = --help ]]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
fi
repo=$(cd "$here/../.." && pwd)
tiny=$repo/examples/tiny
data=$tiny/data/tasks/digit
mkdir -p "${1:-$here/out}"
out=$(cd "${1:-$here/out}" && pwd)
# shellcheck source=examples/environment.sh
. "$repo/examples/environment.sh"
student=${2:-$tiny/out/stage2/checkpoint_last.pt}
[[ $student = /* ]] || student=$PWD/$student
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a model this small gains nothing from threads, and waits for them
began=$SECONDS

step() { printf '\n== %s  (%d s)\n' "$1" $((SECONDS - began)); }
trap 'printf "\nStopped. Finished parts are kept; run the same command again to resume.\n" >&2; exit 130' INT TERM

environment() {  # that of examples/tiny/run.sh, or one of our own
    venv=$tiny/out/venv
    if [ -f "$venv/ready" ] && [ -x "$venv/bin/skill-labels" ]; then return; fi
    venv=$out/venv
    if [ -f "$venv/ready" ]; then return; fi
    make_environment "$venv" ''
    touch "$venv/ready"
}

transcripts() {  # utterance, tab, the digit as a word
    awk -F '\t' 'BEGIN { split("ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE", word, " ") }
        FNR > 1 { print $1 "\t" word[$3 + 1] }' "$data"/{train,valid,test}.labels.tsv
}

labels() {  # folder, options ...
    local folder=$1
    shift
    if [ -f "$folder/done" ]; then
        echo "is done: $folder"
        return
    fi
    tool skill-labels "$data"/{train,valid,test}.tsv --transcripts "$out/transcripts.tsv" --out "$folder" "$@"
    touch "$folder/done"
}

progress() {  # fairseq's log on stdin, one short line on the screen
    awk '
        /train_inner/ {
            line = ""
            for (i = 1; i <= NF; i++) {
                split($i, pair, "="); sub(",", "", pair[2])
                if (pair[1] ~ /^(num_updates|loss|nll_loss)$/) line = line sprintf("  %s %s", pair[1], pair[2])
            }
            printf "\r%s   ", line; fflush()
        }
        END { print "" }'
}

finetune() {  # folder, labels, overrides ...
    local run=$1 folder=$2
    shift 2
    if [ ! -f "$run/done" ]; then
        mkdir -p "$run"
        if ! tool fairseq-hydra-train --config-dir "$repo/config/finetune" --config-name tiny_ctc task.data="$folder" \
            model.w2v_path="$student" hydra.run.dir="$run" checkpoint.save_dir="$run" "$@" 2>&1 |
            tee "$run/log" | progress; then
            tail -n 20 "$run/log" >&2
            return 1
        fi
        touch "$run/done"
    fi
    if [ ! -f "$run/wer.txt" ]; then
        "$venv/bin/python" "$here/decode.py" "$run/checkpoint_last.pt" "$folder" train valid test --out "$run/recognised" \
            2> "$run/decode.log" | grep WER > "$run/wer.txt.partial" || { tail -n 20 "$run/decode.log" >&2; return 1; }
        mv "$run/wer.txt.partial" "$run/wer.txt"
    fi
    cat "$run/wer.txt"
}

if [ $# -lt 2 ]; then
    step "a student: examples/tiny/run.sh"
    bash "$tiny/run.sh"
fi
if [ ! -f "$student" ]; then
    echo "$student: no such checkpoint; give one of task skill_distillation, stage 2" >&2
    exit 2
fi

step "environment"
environment
echo "$venv"

step "labels"
transcripts > "$out/transcripts.tsv"
labels "$out/letters"
labels "$out/pieces" --units unigram --vocabulary-size 20

step "hubert_ctc on letters"
finetune "$out/hubert_ctc" "$out/letters"

step "wav2vec_ctc on SentencePiece pieces"
finetune "$out/wav2vec_ctc" "$out/pieces" model._name=wav2vec_ctc task.labels=spm criterion.post_process=sentencepiece

step "done"
printf 'speakers: train and valid have four, test has two others\n'
printf 'recognised %s\n' "$out"/{hubert_ctc,wav2vec_ctc}/recognised/test.tsv
