#!/usr/bin/env python3
"""Time to a student: runs examples/tiny/run.sh of a clone from scratch, and appends a row to leaderboard.csv.

    python examples/tiny/leaderboard.py --note "attention block by block"
    python examples/tiny/leaderboard.py --clone ../at_an_earlier_commit

The seconds are those from the installed package to the exported student: clustering, both stages, shrinking, export.
Use an idle machine; rows of different processors are not comparable.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = {
    "cluster": "cluster the teacher's layers",
    "stage 1": "stage 1: distil and prune",
    "shrink": "shrink",
    "stage 2": "stage 2: distil the shrunk student",
    "export": "export",
}
"""Columns, and run.sh's names of these steps."""


def seconds_of(said: str) -> dict[str, int]:
    """Seconds of each step from run.sh's output.

    Raises:
        ValueError: a step is missing.
    """
    times = {name: int(took) for name, took in re.findall(r"(?m)^(\S.*?) +(\d+) s$", said)}
    missing = [name for name in STEPS.values() if name not in times]
    if missing:
        raise ValueError(f"run.sh's output lacks {missing}; expected a line with the seconds of each step")
    return {column: times[name] for column, name in STEPS.items()}


def row(clone: Path, out: Path, said: str, note: str) -> dict[str, object]:
    """A row of the table, from run.sh's output and files."""
    seconds = seconds_of(said)
    results = json.loads((out / "probe.json").read_text(encoding="utf-8"))["results"]
    found = {entry["task"]: entry for entry in results if entry["model"] == "student"}
    git = ["git", "-C", str(clone)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "date": date.today().isoformat(),
        "commit": commit + "+" * bool(dirty.strip()),
        "seconds": sum(seconds.values()),
        **seconds,
        "digits": f"{found['digit']['correct'] / found['digit']['total']:.4f}",
        "speakers": f"{found['speaker']['correct'] / found['speaker']['total']:.4f}",
        "parameters": found["digit"]["parameters"],
        "cpu": cpu.group(1) if cpu else "",
        "cores": os.cpu_count(),
        "note": note,
    }


def append(path: Path, found: dict[str, object]) -> None:
    """Appends a row to the table, which is created if missing."""
    new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(found), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path, default=HERE.parents[1], help="repository to run (default: this one)")
    parser.add_argument("--note", default="", help="what changed, and why it is faster")
    parser.add_argument("--table", type=Path, default=HERE / "leaderboard.csv", help="CSV file (default: beside this)")
    args = parser.parse_args(argv)
    script = args.clone / "examples" / "tiny" / "run.sh"
    with tempfile.TemporaryDirectory() as out:
        with subprocess.Popen(["bash", str(script), out], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            said = []
            for line in child.stdout:
                sys.stdout.write(line)
                said.append(line)
        if child.returncode:
            print(f"error: {script} ended with {child.returncode}; see above", file=sys.stderr)
            return 1
        append(args.table, row(args.clone, Path(out), "".join(said), args.note))
    return 0


if __name__ == "__main__":
    sys.exit(main())
