#!/usr/bin/env python3
"""Do groups beat single layers? reduced_table.csv and reduced.png from the runs in reduced.csv:

python examples/benchmark/results/reduced.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results_table import Line, draw_dots, ends, read_runs, write_table  # noqa: E402

from skill_fairseq.comparison.statistics import crossed_mean, paired_difference  # noqa: E402

BASELINE = "dphubert"
METHODS = {
    "shared_projection": "groups of similar layers,\none shared projection (default)",
    "skill": "the same groups,\na projection each",
    "random_groups": "random groups of the same sizes,\na projection each",
    "last_layer": "the last layer",
    "no_distillation": "none: pruned at once",
}
"""Methods, and their labels in the picture; the last one is off its scale."""
MEASURES = {
    "digit": ("digits, change in points", 100.0),
    "speaker": ("6 speakers, change in points", 100.0),
    "verification": ("verification error, points", 100.0),
    "l1_normalized": ("change in L1 to the teacher", 1.0),
}
"""Columns, their labels in the picture, and their scale."""


def means(runs: Sequence[dict[str, str]], method: str, column: str) -> np.ndarray:
    """(seeds,) means over the sparsities."""
    seeds = sorted({run["seed"] for run in runs if run["method"] == method})
    mine = ([float(run[column]) for run in runs if (run["method"], run["seed"]) == (method, seed)] for seed in seeds)
    return np.array([np.mean(found) for found in mine])


def speakers(runs: Sequence[dict[str, str]], measure: str) -> list[str]:
    """Columns of a measure's speakers; a distance has one per recording, because speakers have different numbers."""
    if measure != "l1_normalized":
        return [name for name in runs[0] if name.startswith(f"{measure}, ")]
    file = HERE.parents[1] / "tiny" / "data" / "valid.speakers.tsv"
    return [f"{measure}, {row.split()[-1]}" for row in file.read_text(encoding="utf-8").splitlines()[1:]]


def table(runs: Sequence[dict[str, str]]) -> list[Line]:
    """Means over sparsities and seeds, and differences to DPHuBERT's layers."""
    sparsities = " ".join(sorted({run["sparsity"] for run in runs}))
    lines = []
    for method in (BASELINE, *METHODS):
        for measure in MEASURES:
            columns = speakers(runs, measure)
            values, baseline = (
                np.stack([means(runs, name, column) for column in columns], 1) for name in (method, BASELINE)
            )
            mean = float(means(runs, method, measure).mean())
            interval = ends(crossed_mean(values, columns))
            less = None if method == BASELINE else paired_difference(values, baseline, columns)
            paired = (None, None) if less is None else (less.value, ends(less))
            lines.append(Line(sparsities, method, len(values), measure, mean, interval, *paired))
    return lines


def draw(runs: Sequence[dict[str, str]], path: Path) -> None:
    """Differences to DPHuBERT's layers, one panel per measure."""
    lines = [x for x in table(runs) if x.method not in (BASELINE, "no_distillation") and x.difference is not None]
    panels = {
        label: [
            (METHODS[x.method], 0, scale * (x.difference or 0.0), x.difference_interval and _scaled(x, scale))
            for x in lines
            if x.measure == measure
        ]
        for measure, (label, scale) in MEASURES.items()
    }
    draw_dots(path, panels, reference=dict.fromkeys(panels, 0.0), reference_label="DPHuBERT's single layers")


def _scaled(line: Line, scale: float) -> tuple[float, float]:
    assert line.difference_interval is not None
    return scale * line.difference_interval[0], scale * line.difference_interval[1]


if __name__ == "__main__":
    committed = read_runs(HERE / "reduced.csv")
    write_table(HERE / "reduced_table.csv", table(committed))
    draw(committed, HERE / "reduced.png")
