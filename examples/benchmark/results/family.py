#!/usr/bin/env python3
"""The family's runs as a table and a picture: family.csv, family.png, and the part of ../README.md between its marks.

python examples/benchmark/results/family.py OUT [OUT ...]    adds what these folders of run.py have, then as below
python examples/benchmark/results/family.py                  draws and tabulates what family.csv has
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from runs_table import write_runs  # noqa: E402

from skill_fairseq.comparison.statistics import Estimate, crossed_mean, paired_difference  # noqa: E402
from skill_fairseq.files import atomic_write, read_json, write_file  # noqa: E402
from skill_fairseq.probing.intervals import show_interval  # noqa: E402
from skill_fairseq.text_tables import markdown  # noqa: E402

Row = Mapping[str, str]
BASELINE = "shared_projection"
TEACHER = "teacher"
TASKS = {
    "digit": "digits",
    "speaker": "6 speakers",
    "speakers_40": "40 speakers",
    "verification": "verification error",
    "drinks": "drinks",
    "letters": "letter error",
}
"""Columns of rates, and what table and picture call them."""
MARKS = "<!-- results/family.py -->", "<!-- end -->"


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of folders that run.py has written, the teacher first; of the same run the last folder's. What was
    made by changed files, of no commit, is left out."""
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for folder in folders:
        if (folder / "references.json").is_file():  # not where single runs were made by --run
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
    """Writes what folders have into family.csv; rows of other runs stay."""
    before = read_runs(path) if path.is_file() else []
    with tempfile.TemporaryDirectory() as folder:  # the file itself is replaced once, by all rows
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
    first = (TEACHER, BASELINE, "dphubert", "last_layer", "no_distillation")
    return first.index(method) if method in first else len(first)


def read_runs(path: Path) -> list[dict[str, str]]:
    """family.csv."""
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def chosen(runs: Sequence[Row], method: str, sparsity: str) -> list[Row]:
    """A method's runs of one size, by seed."""
    return sorted((r for r in runs if (r["method"], r["sparsity"]) == (method, sparsity)), key=lambda r: int(r["seed"]))


def by_speaker(rows: Sequence[Row], column: str) -> tuple[np.ndarray, list[str]]:
    """(seeds, speakers) values of a column, and who the speakers are; one value a seed where nobody knows."""
    names = [n for n in rows[0] if n.startswith(f"{column}, ") and all(row[n] for row in rows)]
    names = names or [column]
    return np.array([[float(row[name]) for name in names] for row in rows]), names


def estimate(rows: Sequence[Row], column: str) -> Optional[Estimate]:
    """Mean of a column over seeds and speakers, and its interval; None where a run lacks it."""
    if not rows or not all(row.get(column) for row in rows):
        return None
    mean = float(np.mean([float(row[column]) for row in rows]))
    found = crossed_mean(*by_speaker(rows, column))._replace(value=mean)
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))  # Student's t knows no bounds


def difference(rows: Sequence[Row], baseline: Sequence[Row], column: str) -> Optional[Estimate]:
    """Mean difference to the baseline over the seeds that both have, paired; a lone run stands for every seed."""
    common = {row["seed"] for row in rows} & {row["seed"] for row in baseline}
    rows = [row for row in rows if row["seed"] in common]
    baseline = [row for row in baseline if row["seed"] in common]
    if not rows or not all(row.get(column) for row in [*rows, *baseline]):
        return None
    values, names = by_speaker(rows, column)
    return paired_difference(values, by_speaker(baseline, column)[0], names)


def tables(runs: Sequence[Row]) -> str:
    """Markdown: of each size what the methods got and cost, and their differences to the baseline."""
    tasks = [task for task in TASKS if any(row.get(task) for row in runs)]
    parts = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in runs if row["method"] != TEACHER):
        methods = list(dict.fromkeys(row["method"] for row in runs if row["sparsity"] == sparsity))
        head = ["method", "seeds", *(f"{TASKS[task]} %" for task in tasks)]
        head += ["1 - CKA", "parameters", "M MACs", "ms", "training, CPU s"]
        lines = [head]
        for name, size in ((TEACHER, "0"), *((method, sparsity) for method in methods)):
            rows = chosen(runs, name, size)
            if rows:
                seeds = "-" if name == TEACHER else str(len(rows))
                lines.append([name, seeds, *(_shown(estimate(rows, task)) for task in tasks), *_costs(rows)])
        told = [task for task in tasks if len(by_speaker(runs[:1], task)[1]) > 2]
        less = [["method", *(f"{TASKS[task]}, points" for task in told)]]
        for method in methods:
            found = [difference(chosen(runs, method, sparsity), chosen(runs, BASELINE, sparsity), t) for t in told]
            if method != BASELINE and any(found):
                less.append([method, *(_shown(e, signed=True) for e in found)])
        parts.append(f"Sparsity {sparsity}:\n\n{markdown(lines)}")
        if len(less) > 1:
            parts.append(f"Sparsity {sparsity}, less `{BASELINE}`, paired by seed and speaker:\n\n{markdown(less)}")
    return "\n\n".join(parts)


def _shown(found: Optional[Estimate], signed: bool = False) -> str:
    if found is None:
        return "-"
    bounds = None if found.low is None or found.high is None else (found.low, found.high)
    return show_interval(found.value, bounds, signed=signed)


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    for column, scale, shown in (
        ("cka", 1.0, ".3f"),
        ("parameters", 1.0, ",.0f"),
        ("macs", 1e-6, ".0f"),
        ("milliseconds", 1.0, ".1f"),
        ("training cpu seconds", 1.0, ".0f"),
    ):
        values = [float(row[column]) for row in rows if row.get(column)]
        yield f"{scale * float(np.mean(values)):{shown}}" if values else "-"


def draw(runs: Sequence[Row], path: Path) -> None:
    """Quality against size, a panel a task, with intervals where there are any; the teacher is a line across."""
    from skill_fairseq.reporting.pictures import STYLES, drawing

    students = [row for row in runs if row["method"] != TEACHER]
    tasks = [task for task in TASKS if any(row.get(task) for row in students)]
    methods = list(dict.fromkeys(row["method"] for row in students))
    sizes = sorted({row["sparsity"] for row in students}, key=float, reverse=True)
    counts = [np.median([float(r["parameters"]) for r in students if r["sparsity"] == size]) for size in sizes]
    with drawing(path, (9.0, 2.9 * -(-len(tasks) // 2) + 1.0)) as figure:
        panels = figure.subplots(-(-len(tasks) // 2), 2, squeeze=False).flat
        for panel, task in zip(panels, tasks):
            for place, (method, (colour, dashes, marker)) in enumerate(zip(methods, STYLES)):
                found = [(x, estimate(chosen(runs, method, size), task)) for x, size in enumerate(sizes)]
                points = [(x + 0.7 * ((place + 0.5) / len(methods) - 0.5), e) for x, e in found if e is not None]
                values = np.array([e.value for _, e in points])
                ends = [[e.value if end is None else end for end in (e.low, e.high)] for _, e in points]
                reach = 100 * np.abs(np.array(ends).reshape(-1, 2) - values[:, None]).T
                style = {"color": colour, "linestyle": dashes, "marker": marker, "linewidth": 0.9, "elinewidth": 1.1}
                panel.errorbar([x for x, _ in points], 100 * values, reach, markersize=4, label=method, **style)
            teacher = estimate(chosen(runs, TEACHER, "0"), task)
            if teacher is not None:
                panel.axhline(100 * teacher.value, color="#777777", linewidth=1, label=TEACHER)
            panel.set_xticks(range(len(sizes)), [f"{count / 1000:.0f} k" for count in counts])
            panel.set(xlabel="parameters", ylabel=f"{TASKS[task]}, %", xlim=(-0.5, len(sizes) - 0.5))
            panel.spines[["top", "right"]].set_visible(False)
        for panel in list(figure.axes)[len(tasks) :]:
            panel.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="*", type=Path, metavar="OUT", help="folders of run.py")
    args = parser.parse_args(argv)
    if args.out:
        add_runs(HERE / "family.csv", args.out)
    runs = read_runs(HERE / "family.csv")
    page = HERE.parent / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    write_file(page, f"{before}{MARKS[0]}\n\n{tables(runs)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    draw(runs, HERE / "family.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
