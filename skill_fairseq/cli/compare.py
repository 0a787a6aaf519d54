"""`skill-compare`: models over several seeds, beside a baseline."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skill_fairseq.cli._common import Done, Parser, run
from skill_fairseq.comparison.probes import compare_probes
from skill_fairseq.comparison.table import show_difference, show_estimate
from skill_fairseq.files import named, read_json
from skill_fairseq.reporting.shapes import check
from skill_fairseq.text_tables import aligned

EPILOG = """examples:
  for seed in 1 2 3; do
      skill-probe plain=plain_$seed.safetensors mine=mine_$seed.safetensors --task tasks/digit --json > $seed.json
  done
  skill-compare 1.json 2.json 3.json --baseline plain

Each FILE is one seed, with the same models under the same names, probed on the same recordings. Means have 95 %
intervals over seeds and speakers together (two-way random effects; error rates by jackknife). Differences are paired
by seed and recording. If an interval contains 0, the two are not distinguishable: the data allow differences up to the
bound that is given. With fewer than three speakers there is no interval.
"""

ENTRY = {"model": str, "task": str, "metric": str, "value": float, "speakers": [str]}
OUTCOMES = {"right?": str, "by_speaker?": ([float], None)}
PRINTS = {
    "baseline": "name of the baseline",
    "seeds": "paths of the files",
    "results": "for each model and task: metric, mean with its interval, and the difference to the baseline",
}


@functools.partial(run, json_file=False)
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    names = [str(file) for file in args.file]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"FILE: {name} is given {names.count(name)} times; each is one seed: give it once")
    rows = compare_probes({name: _entries(Path(name)) for name in names}, args.baseline)
    print(format_table(rows, args.baseline))
    return Done({"baseline": args.baseline, "seeds": names, "results": rows})


def _entries(file: Path) -> list[dict[str, Any]]:
    found = read_json(file)
    with named(str(file)):
        check(found, {"results": [{**ENTRY, **OUTCOMES}]})
    return list(found["results"])


def format_table(rows: Sequence[dict[str, Any]], baseline: str) -> str:
    """A line for each model and task; rates in percent, differences in percentage points."""
    lines = [["model", "task", "seeds", "metric, %", f"less {baseline}, points"]]
    for row in rows:
        less = "-" if row["difference"] is None else show_difference(row["difference"], 100, 1)
        value = f"{row['metric']} {show_estimate(row['estimate'], 100, 1)}"
        lines.append([row["model"], row["task"], str(row["seeds"]), value, less])
    return aligned(lines, left=5)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-compare",
        description="Compare models over several seeds with a baseline: means, paired differences, intervals.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    parser.add_argument("file", nargs="+", type=Path, metavar="FILE", help="output of skill-probe --json, one a seed")
    parser.add_argument("--baseline", required=True, metavar="NAME", help="name of the model to compare with")
    return parser
