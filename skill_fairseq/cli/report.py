"""`skill-report`: one page on a run or a benchmark."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from skill_fairseq.cli._common import Done, Parser, in_range, run
from skill_fairseq.files import check_output
from skill_fairseq.messages import require
from skill_fairseq.reporting.benchmark_report import benchmark_report
from skill_fairseq.reporting.run_folder import read_run_folder
from skill_fairseq.reporting.run_report import run_report

EPILOG = """examples:
  skill-report examples/tiny/out
  skill-report RUN --out report --teacher WavLM-Base+.pt --data manifests
  skill-report BENCHMARK                  a folder of examples/benchmark/run.py

RUN holds what examples/tiny/run.sh makes: clusters/, trainings in folders of their own (hydra_train.log or log,
.hydra/), shrunk.safetensors, student.safetensors, probe.json. What is missing is left out, and named at the end.
Distances between encoders are taken in pieces where a recording is longer than a minute.
Writes OUT/report.html, which needs no other file and no network, and the pictures in it as PNG files.
"""

PRINTS = {
    "file": "path of the page",
    "bytes": "size of the page",
    "pictures": "paths of the pictures",
}


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    require("skill-report", "matplotlib")
    out = args.out or args.folder / "report"
    if args.out is None and out.is_symlink():
        raise ValueError(f"{out}: is a link to {out.readlink()}, outside of the run; give --out DIR, or remove it")
    check_output(out / "report.html", "--out")
    folder = read_run_folder(args.folder, args.teacher, args.data)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as made:
        if folder.benchmark is not None:
            text = benchmark_report(folder, Path(made))
        else:
            text = run_report(folder, Path(made), args.max_seconds)
        # Names of folders may be no text.
        Path(made, "report.html").write_text(text, encoding="utf-8", errors="backslashreplace")
        files = [file.replace(out / file.name) for file in sorted(Path(made).iterdir())]  # a link is replaced itself
    page = out / "report.html"
    size = page.stat().st_size
    print(f"wrote {page}, {size / 1e6:.2f} MB")
    return Done({"file": str(page), "bytes": size, "pictures": [str(file) for file in files if file != page]})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-report",
        description="Write one page on a run or a benchmark: results, curves, sizes, distances, settings.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of results")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/report)")
    add(
        "--teacher",
        type=Path,
        metavar="FILE",
        help="file or folder of the teacher (default: as in the training's settings)",
    )
    add("--data", type=Path, metavar="DIR", help="folder with valid.tsv (default: as in the training's settings)")
    add(
        "--max-seconds",
        type=in_range(float, above=0, endless=True),
        default=120.0,
        metavar="S",
        help="most audio to measure distances on, seconds; inf: all (default: 120)",
    )
    return parser
