"""`skill-info`: what a file or folder is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from skill_fairseq.cli._common import Parser, run
from skill_fairseq.exporting.describe import as_dict, as_lines, describe

EPILOG = """examples:
  skill-info WavLM-Base+.pt
  skill-info student.onnx --json | jq .parameters

FILE is anything that skill_fairseq.load_encoder reads or skill-export writes, recognised by its content. Weights are
read and compared with the shape, but for graphs (onnx, pt2), which are taken at their word. Of a file that does not say
everything, the lines "assumed" name what was decided here; "left out" are weights that the encoder has no use for.
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    found = describe(args.file, args.trust)
    print(json.dumps(as_dict(found), indent=2) if args.json else "\n".join(as_lines(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-info",
        description="Say what a file or folder is, what shape its encoder has and where it comes from.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="file or folder to read")
    add("--json", action="store_true", help="as JSON")
    parser.add_trust()
    return parser
