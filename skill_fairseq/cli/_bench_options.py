"""Options of `skill-bench`, and what `--json` prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skill_fairseq.benchmarking.setup import ARCHITECTURES, INFERENCE_PRECISIONS, PRECISIONS
from skill_fairseq.cli._common import Parser, in_range
from skill_fairseq.pruning.latency import PARTS

COUNT, AMOUNT = in_range(int, least=1, most=10**9), in_range(int, least=0, most=10**9)
LENGTH, LIMIT = in_range(float, least=0.025, most=86_400), in_range(float, above=0, most=10**9)
SPARSITY, SHARE = in_range(float, least=0, below=1), in_range(float, above=0, most=1)

CONSUMERS = {
    "transformers": ("transformers",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
"""What --against may name, and the modules that it needs."""

EPILOG = """what is measured:
  train    one training step: teacher, student and loss, backward, AdamW (stage 1 with gates, stage 2 shrunk)
  infer    one forward; with --sparsity of a shrunk student
  cluster  what measuring the layers' similarity adds to the teacher's forward
  load     the data loader by itself
  table    times of whole students by the widths of their parts, for criterion.target={latency_ms: 40, table: FILE}

examples:
  skill-bench train --seconds 30 --against transformers                 stage 1 at its start
  skill-bench train --seconds 30 --sparsity 0.75 --against transformers stage 1 once the gates are closed
  skill-bench train --stage 2 --sparsity 0.75 --seconds 30
  skill-bench infer --seconds 10 --sparsity 0.75 --against full         the shrunk student beside the full encoder
  skill-bench infer --seconds 10 --precision int8 --against transformers,onnxruntime,openvino
  skill-bench infer --model student.safetensors --seconds 10 --json > student.json
  skill-bench train --device cuda --precision bf16 --seconds 15.6 --find-max-tokens
  skill-bench load --manifest manifests/train.tsv --workers 2
  skill-bench table --model teacher.safetensors --seconds 10 --runtime onnxruntime --json > latency.json

Contestants run in processes of their own and take turns (A B A B), so that a busy machine treats them alike; compare
minima. Weights and audio are random where no --model is given: speed does not depend on them. With gates, so many
units are opened at random that the expected sparsity is the one asked for: --keep-conv says how many of the conv
channels, whose share of the work is far larger than their share of the parameters.
"""

ABOUT = {"what": "what was measured", "machine": "device, threads and versions", "setup": "options and shape"}
PRINTS = {
    "train": {
        **ABOUT,
        "results": "of each contestant: seconds by phase, peak bytes, parameters; null with --find-max-tokens",
        "largest batch": "by --find-max-tokens: utterances, peak bytes, dataset.max_tokens; else null",
    },
    "infer": {
        **ABOUT,
        "results": "of each contestant: seconds, peak bytes, parameters, multiply-accumulates",
        "products": "rate of matrix products on this CPU; null on a GPU",
    },
    "cluster": {
        **ABOUT,
        "forward s": "seconds of each forward",
        "similarity s": "seconds of each measurement of similarity",
        "overhead": "the second as a fraction of the first",
    },
    "table": {
        **ABOUT,
        "runtime": "what ran the students",
        "seconds": "length of the utterance",
        "shape": "fields of the encoder that the table is for",
        "rest_ms": "milliseconds of what no gate can close",
        **dict.fromkeys(PARTS, "widths, and milliseconds of one part at each"),
        "check": "mixed students: multiply-accumulates, milliseconds measured and by the table",
    },
    "load": {
        "what": "what was measured",
        "machine": "device, threads and versions",
        "batches": "number of batches",
        "audio seconds": "seconds of audio",
        "seconds": "seconds that loading took",
        "audio seconds per second": "the one by the other",
    },
}


def make_parser(measures: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]]) -> Parser:
    """The command's parser.

    Args:
        measures: function that measures, by name of the part; parsed arguments have it as ``measure``.
    """
    parser = Parser(
        prog="skill-bench",
        description="Measure training steps, inference, clustering or data loading.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="{train,infer,cluster,table,load}")
    for what, help in (
        ("train", "one training step"),
        ("infer", "one forward"),
        ("cluster", "similarity of layers on top of the teacher's forward"),
        ("table", "times of whole students by the widths of their parts"),
    ):
        command = commands.add_parser(what, help=help, prints=PRINTS[what])
        command.set_defaults(measure=measures[what])
        _add_common(command)
        if what == "table":
            _add_table(command)
        elif what != "cluster":
            _add_steps(command, what)
    load = commands.add_parser("load", help="the data loader by itself", prints=PRINTS["load"])
    load.set_defaults(measure=measures["load"], device="cpu", threads=None)
    add = load.add_argument
    add("--manifest", type=Path, required=True, metavar="MANIFEST", help="manifest SPLIT.tsv, read as in training")
    workers = in_range(int, least=0, most=1024)
    add(
        "--workers", type=workers, default=0, metavar="N", help="number of loading processes (default: 0, the main one)"
    )
    add("--max-tokens", type=COUNT, default=2_560_000, metavar="N", help="batch size, samples (default: 160 s of them)")
    add(
        "--max-sample-size",
        type=COUNT,
        default=250_000,
        metavar="N",
        help="most of an utterance, samples (default: 15.6 s)",
    )
    add(
        "--min-sample-size", type=AMOUNT, default=32_000, metavar="N", help="shortest utterance, samples (default: 2 s)"
    )
    add("--max-seconds", type=LIMIT, default=1000.0, metavar="S", help="most audio to load, seconds (default: 1000)")
    return parser


def _add_common(command: Parser) -> None:
    add = command.add_argument
    add(
        "--arch",
        choices=ARCHITECTURES,
        default="wavlm_base_plus",
        help="shape of the encoder (default: wavlm_base_plus)",
    )
    add("--model", metavar="FILE", help="file or folder that load_encoder reads, instead of --arch")
    add("--seconds", type=LENGTH, default=15.0, metavar="S", help="length of each utterance, seconds (default: 15)")
    add(
        "--batch-size",
        type=COUNT,
        default=1,
        dest="batch",
        metavar="N",
        help="number of utterances in a batch (default: 1)",
    )
    command.add_device()
    add(
        "--threads",
        type=in_range(int, least=1, most=1024),
        metavar="N",
        help="number of CPU threads (default: torch's)",
    )
    add(
        "--repeats", type=COUNT, default=5, metavar="N", help="number of measured steps of each contestant (default: 5)"
    )
    add("--warmup", type=AMOUNT, default=2, metavar="N", help="number of steps before them (default: 2)")
    command.add_seed("weights, audio and gates")


def _add_table(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--runtime",
        choices=("torch", "onnxruntime"),
        default="torch",
        help="program that runs the students (default: torch)",
    )
    points, several = in_range(int, least=1, most=100), in_range(int, least=0, most=1000)
    add("--points", type=points, default=4, metavar="N", help="number of widths of each part (default: 4)")
    add("--mixed", type=several, default=16, metavar="N", help="number of random students to fit (default: 16)")
    add("--checks", type=several, default=4, metavar="N", help="number of other ones to check by (default: 4)")


def _add_steps(command: argparse.ArgumentParser, what: str) -> None:
    add = command.add_argument
    add("--sparsity", type=SPARSITY, default=0.0, metavar="S", help="fraction of the parameters removed (default: 0)")
    add("--keep-conv", type=SHARE, metavar="F", help="fraction of conv channels kept (default: as of all units)")
    precisions = INFERENCE_PRECISIONS if what == "infer" else PRECISIONS
    add("--precision", choices=precisions, default="fp32", help="precision of weights and products (default: fp32)")
    add("--compile", action="store_true", help="torch.compile for the layers of the teacher (train) or encoder (infer)")
    against = [*CONSUMERS, "full"] if what == "infer" else ["transformers"]
    several = f"{{{','.join(against)}}}" + (", several by commas" if what == "infer" else "")
    add("--against", type=_against(against), metavar="NAMES", help=f"contestants that take turns with it: {several}")
    if what == "train":
        add(
            "--stage", type=int, choices=(1, 2), default=1, help="number of the stage; 1: gates, 2: shrunk (default: 1)"
        )
        add("--teacher-dtype", choices=PRECISIONS, default="fp32", help="precision of the teacher (default: fp32)")
        add("--find-max-tokens", action="store_true", help="the largest batch that fits, in place of times")
        add("--memory", type=LIMIT, metavar="GB", help="memory for --find-max-tokens, GB (default: all of the GPU's)")


def _against(choices: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in choices or found.count(name) > 1:
                raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(choices)}, each once")
        return found

    return read
