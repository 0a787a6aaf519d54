"""Decodes with fairseq's own Viterbi decoder and prints the word error rate.

    python examples/ctc/decode.py checkpoint_last.pt labels test            # labels: from skill-labels
    python examples/ctc/decode.py checkpoint_last.pt labels train valid test --out hypotheses

`--out` writes SPLIT.tsv for each split: recording, reference, hypothesis.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import editdistance
import fairseq.examples
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data.data_utils import post_process
from fairseq.utils import strip_pad

import skill_fairseq  # noqa: F401  (registers the student)
from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.cli._common import Parser, run
from skill_fairseq.files import atomic_write, check_output

sys.modules["examples"] = fairseq.examples  # the name that files in there import each other by
from examples.speech_recognition.new.decoders.decoder import Decoder  # noqa: E402


def decode(model: Any, task: Any, decoder: Any, split: str, symbol: str) -> list[tuple[str, str]]:
    """Reference and hypothesis, in words, for every recording of a split in order."""
    task.load_dataset(split)
    dataset = task.dataset(split)
    # One at a time, because fairseq's hubert_ctc would also decode a batch's padding.
    batches = task.get_batch_iterator(dataset, max_sentences=1)
    words = task.target_dictionary.string
    found: dict[int, tuple[str, str]] = {}
    for sample in batches.next_epoch_itr(shuffle=False):
        hypotheses = task.inference_step(decoder, [model], sample)
        for i, target, hypothesis in zip(sample["id"].tolist(), sample["target"], hypotheses):
            said = words(strip_pad(target, task.target_dictionary.pad()))
            found[i] = (post_process(said, symbol), post_process(words(hypothesis[0]["tokens"]), symbol))
    return [found[i] for i in range(len(dataset))]


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "checkpoint", help="checkpoint of hubert_ctc or wav2vec_ctc, fine-tuned with task audio_finetuning"
    )
    parser.add_argument("data", type=Path, help="folder from skill-labels")
    parser.add_argument("splits", nargs="+", help="train, valid, test, ...")
    parser.add_argument("--out", type=Path, help="folder for the hypotheses")
    args = parser.parse_args(argv)
    if args.out is not None:
        for split in args.splits:
            check_output(args.out / f"{split}.tsv", "--out")

    where = {"data": str(args.data.resolve())}
    (model,), cfg, task = load_model_ensemble_and_task([args.checkpoint], arg_overrides=where)
    model.eval()
    decoder = Decoder(Namespace(type="viterbi"), task.target_dictionary)
    for split in args.splits:
        with torch.no_grad():
            rows = decode(model, task, decoder, split, cfg.criterion.post_process)
        errors = sum(editdistance.eval(heard.split(), said.split()) for said, heard in rows)
        total = sum(len(said.split()) for said, _ in rows)
        print(f"{split}: WER {100 * errors / total:.2f} % ({errors} errors in {total} words, {len(rows)} recordings)")
        if args.out is not None:
            paths = read_manifest(args.data / f"{split}.tsv").paths
            with atomic_write(args.out / f"{split}.tsv") as temporary:
                lines = ("\t".join((path, *row)) for path, row in zip(paths, rows))
                temporary.write_text("\n".join(("path\tsaid\trecognised", *lines)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
