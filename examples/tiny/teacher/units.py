"""k-means units for HuBERT-style pre-training: MFCC for the first round, a model's layer for the second.

Writes <out>/<split>.km (one line of unit numbers an utterance) and <out>/dict.km.txt, as fairseq's
``hubert_pretraining`` task reads them.

Examples:
    python units.py --data manifests --out round1 --units 100
    python units.py --data manifests --out round2 --units 200 --model round1/checkpoint_last.pt --layer 7
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm

from skill_fairseq import load_encoder
from skill_fairseq.audio.features import mfcc
from skill_fairseq.audio.manifest import load_audio, read_manifest
from skill_fairseq.files import atomic_write


def features(manifest_path: Path, model: str | None, layer: int) -> Iterator[np.ndarray]:
    """(T, D) features of each utterance: 100 frames a second of MFCC, or 50 a second of the model's layer."""
    encoder = None if model is None else load_encoder(model)
    manifest = read_manifest(manifest_path)
    for file in tqdm(manifest.files, desc=f"features of {manifest_path.name}", unit="utt"):
        wave = load_audio(file)
        if encoder is None:
            cepstra = mfcc(wave)
            yield (cepstra - cepstra.mean(0)).numpy()  # less of the channel, more of the sound
        else:
            with torch.no_grad():
                yield encoder(wave[None], last_layer=layer).x[0].numpy()


def main() -> None:
    """Fits k-means on the train split and labels every split found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tsv and valid.tsv")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--units", type=int, default=100, help="number of clusters")
    parser.add_argument("--model", help="checkpoint whose features are clustered; without it, MFCC")
    parser.add_argument("--layer", type=int, default=7, help="layer of the model")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    per_utterance = {s: list(features(args.data / f"{s}.tsv", args.model, args.layer)) for s in ("train", "valid")}
    frames = np.concatenate(per_utterance["train"])
    mean, std = frames.mean(0), frames.std(0)
    kmeans = MiniBatchKMeans(args.units, batch_size=10_000, n_init=5, max_iter=200, random_state=args.seed)
    kmeans.fit((frames - mean) / std)
    for split, utterances in per_utterance.items():
        lines = [" ".join(map(str, kmeans.predict((x - mean) / std))) for x in utterances]
        with atomic_write(args.out / f"{split}.km") as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    with atomic_write(args.out / "dict.km.txt") as temporary:
        temporary.write_text("".join(f"{unit} 1\n" for unit in range(args.units)))
    print(f"{len(frames)} frames, {args.units} units, inertia per frame {kmeans.inertia_ / len(frames):.2f}")


if __name__ == "__main__":
    main()
