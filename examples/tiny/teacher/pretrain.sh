#!/usr/bin/env bash
# Pre-trains the small teacher of this example like HuBERT: a first round on k-means units of MFCC, a second one on
# units of the first model's features. About half an hour on 2 cores for an hour of speech.
#
#   bash examples/tiny/teacher/pretrain.sh MANIFESTS OUT
#
# MANIFESTS holds train.tsv and valid.tsv; OUT receives everything, the teacher as OUT/teacher.safetensors.
# Run it in an environment where skill_fairseq is installed, with the extra "probe" for k-means.
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "$0: bash $BASH_VERSION, expected 4.4 or later" >&2; exit 2; }

manifests=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Every batch has its own length: keep the convolution kernels compiled for each.
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192

mkdir -p "$out/manifests"
for split in train valid; do  # stock fairseq takes a relative root from the working directory: make it absolute
    root=$(cd "$manifests" && cd "$(head -n 1 "$split.tsv")" && pwd)
    { echo "$root"; tail -n +2 "$manifests/$split.tsv"; } > "$out/manifests/$split.tsv"
done

pretrain() {  # round, label rate, overrides ...
    local round=$1 rate=$2
    shift 2
    fairseq-hydra-train --config-dir "$here/../../../config/pretrain" --config-name wavlm_tiny_speech \
        task.data="$out/manifests" task.label_dir="$out/$round" task.label_rate="$rate" \
        hydra.run.dir="$out/$round" checkpoint.save_dir="$out/$round" "$@"
}

units=(skill-labels "$out/manifests/train.tsv" "$out/manifests/valid.tsv" --units kmeans --vocabulary-size 100)
"${units[@]}" --out "$out/round1"
pretrain round1 100 optimization.max_update=1400
"${units[@]}" --out "$out/round2" --teacher "$out/round1/checkpoint_last.pt" --layer 8
# Unlike in HuBERT, the second round starts from the first one's weights, which saves an hour.
pretrain round2 50 optimization.max_update=3000 'optimization.lr=[0.002]' \
    checkpoint.finetune_from_model="$out/round1/checkpoint_last.pt"
skill-export "$out/round2/checkpoint_last.pt" "$out/teacher.safetensors" --dtype float16
