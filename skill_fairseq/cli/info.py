"""`skill-info`: what a file or folder is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from skill_fairseq.cli._common import Done, Parser, run
from skill_fairseq.exporting.describe import as_dict, as_rows, describe
from skill_fairseq.text_tables import aligned

EPILOG = """examples:
  skill-info WavLM-Base+.pt
  skill-info student.onnx --json | jq .parameters

FILE is anything that skill_fairseq.load_encoder reads or skill-export writes, recognised by its content. Weights are
read and compared with the shape, but for graphs (onnx, pt2), which are taken at their word. Of a file that does not say
everything, the lines "assumed" name what was decided here; "left out" are weights that the encoder has no use for.
"""

PRINTS = {
    "format": "what the file was recognised as",
    "types": "number types of the weights",
    "parameters": "number of parameters",
    "original_parameters": "the same before pruning, or null",
    "sparsity": "fraction of the parameters pruned, or null",
    "macs_per_second": "multiply-accumulates for 1 s of audio",
    "gates": "kinds of units with gates",
    "normalize": "whether waveforms are to be normalised",
    "shape": "fields of EncoderConfig",
    "provenance": "where the encoder comes from",
    "assumed": "what the file leaves open",
    "left_out": "names of weights without use",
}


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    return show(args.file, args.trust)


def show(file: Path, trust: bool) -> Done:
    """Prints what a file or folder is."""
    found = describe(file, trust)
    print(aligned(list(as_rows(found)), left=2))
    return Done(as_dict(found))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-info",
        description="Say what a file or folder is, what shape its encoder has and where it comes from.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="file or folder to read")
    parser.add_trust()
    return parser
