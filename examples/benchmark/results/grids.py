#!/usr/bin/env python3
"""A grid's runs as tables and a picture: NAME.csv, NAME_table.csv and NAME.png, with NAME as in grid.yaml; and for some
NAME_equal_macs.csv.

python examples/benchmark/results/grids.py family OUT [OUT ...]    adds the runs of these folders, then as below
python examples/benchmark/results/grids.py family                  draws and tabulates what family.csv has
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results_table import Line, draw_dots, ends, read_runs, write_table  # noqa: E402
from runs_table import write_runs  # noqa: E402

from skill_fairseq.comparison.statistics import Estimate, crossed_mean, paired_difference  # noqa: E402
from skill_fairseq.files import atomic_write, read_json  # noqa: E402

Row = Mapping[str, str]
BASELINES = {
    "family": "shared_projection",
    "elastic": "dedicated",
    "constraint": "lagrangian",
    "cost": "by_parameters",
    "front_end": "shared_projection",
}
"""The baseline method of each grid."""
MACS = {"family": (90e6, 150e6)}
"""Multiply-accumulates at which a grid's students are compared as well."""
TEACHER = "teacher"
TASKS = {
    "digit": "digits",
    "speaker": "6 speakers",
    "speakers_40": "40 speakers",
    "verification": "verification error",
    "drinks": "drinks",
    "letters": "letter error",
}
"""Columns of rates, and their labels in the picture."""
DISTANCES = ("cka", "l1_normalized")
"""Columns of distances to the teacher, treated alike."""
COSTS = ("parameters", "macs", "milliseconds", "training cpu seconds")
"""Columns of size and time, of which the table has means."""


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Results from folders of run.py, the teacher first; for repeated runs, the last folder's. Omits runs of
    uncommitted files."""
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for folder in folders:
        if (folder / "references.json").is_file():  # missing if single runs were made with --run
            reference = read_json(folder / "references.json")[TEACHER]
            nothing = {"recordings": {}, "speakers": None}
            made = {"sparsity": {"actual": 0.0}, "seconds": {}}
            found[TEACHER, 0.0, 0] = {
                **{"method": TEACHER, "sparsity": 0, "seed": 0, "groups": None, "made": made, "distances": nothing},
                **{"cpu": "", "commit": "", **reference},
            }
        for file in sorted(folder.glob("runs/*/result.json")):
            result = read_json(file)
            if (result["commit"] or "+")[-1] != "+":
                found[result["method"], result["sparsity"], result["seed"]] = result
    return [found[key] for key in sorted(found, key=lambda key: (key[1], _order(key[0]), key[0], key[2]))]


def add_runs(path: Path, folders: Sequence[Path]) -> None:
    """Writes the runs of folders into a CSV; keeps rows of other runs."""
    before = read_runs(path) if path.is_file() else []
    with tempfile.TemporaryDirectory() as folder:  # replaces the file once, with all rows
        write_runs(Path(folder) / "new.csv", collect(folders))
        new = read_runs(Path(folder) / "new.csv")
    rows = {(row["method"], row["sparsity"], row["seed"]): row for row in [*before, *new]}
    ordered = sorted(rows, key=lambda key: (float(key[1]), _order(key[0]), key[0], int(key[2])))
    head = list(dict.fromkeys(name for row in rows.values() for name in row))
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in ordered)


def _order(method: str) -> int:
    """Ours first, then the others by name."""
    first = (TEACHER, *BASELINES.values(), "dphubert", "last_layer", "no_distillation")
    return first.index(method) if method in first else len(first)


def chosen(runs: Sequence[Row], method: str, sparsity: str) -> list[Row]:
    """A method's runs of one size, by seed."""
    return sorted((r for r in runs if (r["method"], r["sparsity"]) == (method, sparsity)), key=lambda r: int(r["seed"]))


def by_speaker(rows: Sequence[Row], column: str) -> tuple[np.ndarray, list[str]]:
    """(seeds, speakers) values of a column, and the speakers; one value per seed if speakers are unknown."""
    names = [n for n in rows[0] if n.startswith(f"{column}, ") and all(row[n] for row in rows)]
    names = names or [column]
    return np.array([[float(row[name]) for name in names] for row in rows]), names


def estimate(rows: Sequence[Row], column: str) -> Optional[Estimate]:
    """Mean of a rate or distance over seeds and speakers, and its interval; None if a run lacks it."""
    if not rows or not all(row.get(column) for row in rows):
        return None
    found = crossed_mean(*by_speaker(rows, column))
    if column in DISTANCES:
        return found
    found = found._replace(value=float(np.mean([float(row[column]) for row in rows])))
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))  # Student's t has no bounds


def difference(rows: Sequence[Row], baseline: Sequence[Row], column: str) -> Optional[Estimate]:
    """Paired mean difference to the baseline over common seeds; a single run is used for every seed."""
    common = {row["seed"] for row in rows} & {row["seed"] for row in baseline}
    rows = [row for row in rows if row["seed"] in common]
    baseline = [row for row in baseline if row["seed"] in common]
    if not rows or not all(row.get(column) for row in [*rows, *baseline]):
        return None
    values, names = by_speaker(rows, column)
    return paired_difference(values, by_speaker(baseline, column)[0], names)


def at_equal(runs: Sequence[Row], column: str, value: float) -> list[dict[str, str]]:
    """One row per method and seed: results where this cost has this value, linear between the two students that are
    next to it; ``sparsity`` is the value. Omits seeds all of whose students have less, or all more."""
    rows = []
    for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in runs):
        own = sorted(chosen_seed(runs, method, seed), key=lambda row: float(row[column]))
        x = [float(row[column]) for row in own]
        if not x[0] <= value <= x[-1]:
            continue
        found = {"method": method, "seed": seed, "sparsity": f"{value:.0f}"}
        for name in own[0]:
            if name.split(", ")[0] in (*TASKS, *DISTANCES, "parameters", "macs") and all(row[name] for row in own):
                found[name] = repr(float(np.interp(value, x, [float(row[name]) for row in own])))
        rows.append(found)
    return rows


def chosen_seed(runs: Sequence[Row], method: str, seed: str) -> list[Row]:
    """A method's runs of one seed."""
    return [row for row in runs if (row["method"], row["seed"]) == (method, seed)]


def table(runs: Sequence[Row], baseline: str) -> list[Line]:
    """Results and costs of the methods at each size, and differences to the baseline; the teacher first."""
    lines = []
    measures = [name for name in (*TASKS, *DISTANCES) if any(row.get(name) for row in runs)]
    for method, sparsity in dict.fromkeys((row["method"], row["sparsity"]) for row in runs):
        rows = chosen(runs, method, sparsity)
        for measure in measures:
            found = estimate(rows, measure)
            if found is None:
                continue
            same = method in (TEACHER, baseline)
            less = None if same else difference(rows, chosen(runs, baseline, sparsity), measure)
            paired = (None, None) if less is None else (less.value, ends(less))
            lines.append(Line(sparsity, method, len(rows), measure, found.value, ends(found), *paired))
        for measure in COSTS:
            values = [float(row[measure]) for row in rows if row.get(measure)]
            if values:
                lines.append(Line(sparsity, method, len(rows), measure, float(np.mean(values))))
    return lines


def draw(lines: Sequence[Line], path: Path) -> None:
    """One row per method, panel per task and colour per size; the teacher is a line."""
    tasks = [task for task in TASKS if any(line.measure == task for line in lines)]
    students = [line for line in lines if line.method != TEACHER]
    sizes = list(dict.fromkeys(line.sparsity for line in students))
    counts = [np.median([x.mean for x in students if (x.sparsity, x.measure) == (s, "parameters")]) for s in sizes]
    panels = {
        f"{TASKS[task]}, %": [
            (x.method, sizes.index(x.sparsity), 100 * x.mean, x.interval and (100 * x.interval[0], 100 * x.interval[1]))
            for x in students
            if x.measure == task
        ]
        for task in tasks
    }
    if len(tasks) < 4:  # else the picture is full
        panels["1 - CKA to the teacher"] = [
            (x.method, sizes.index(x.sparsity), x.mean, x.interval) for x in students if x.measure == "cka"
        ]
    teacher = {f"{TASKS[x.measure]}, %": 100 * x.mean for x in lines if x.method == TEACHER and x.measure in TASKS}
    labels = [f"{count / 1000:.0f} k parameters" for count in counts]
    draw_dots(path, panels, labels, teacher, f"{TEACHER}, 1,010 k")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BASELINES, help="grid of the runs")
    parser.add_argument("out", nargs="*", type=Path, metavar="OUT", help="folders of run.py")
    args = parser.parse_args(argv)
    if args.out:
        add_runs(HERE / f"{args.name}.csv", args.out)
    students = read_runs(HERE / f"{args.name}.csv")
    lines = table(students, BASELINES[args.name])
    write_table(HERE / f"{args.name}_table.csv", lines)
    if args.name in MACS:
        runs = [row for value in MACS[args.name] for row in at_equal(students, "macs", value)]
        write_table(HERE / f"{args.name}_equal_macs.csv", table(runs, BASELINES[args.name]), "MACs")
    draw(lines, HERE / f"{args.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
