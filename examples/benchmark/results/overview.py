#!/usr/bin/env python3
"""The top README's picture, from the runs in reduced.csv and family.csv: python
examples/benchmark/results/overview.py"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
METHODS = {
    "shared_projection": "SKILL's groups (default)",
    "dphubert": "DPHuBERT's layers",
    "lrf_kd": "low rank (LRF)",
    "fithubert": "FitHuBERT",
    "distilhubert": "DistilHuBERT",
    "no_distillation": "pruned, not distilled",
}
"""Methods to draw, and their labels in the picture."""
CHANCE = 10.0
Row = Mapping[str, str]


def read(name: str) -> list[Row]:
    """A table of runs beside this file."""
    with open(HERE / name, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def points(rows: list[Row], method: str, column: str, scale: float) -> list[tuple[float, float]]:
    """(x, digits in per cent), means over the seeds of each size, largest x first; omits runs without the column."""
    sizes: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == method and row.get(column):
            sizes.setdefault(row["sparsity"], []).append(row)
    mean = [
        (scale * float(np.mean([float(r[column]) for r in of])), 100 * float(np.mean([float(r["digit"]) for r in of])))
        for of in sizes.values()
    ]
    return sorted(mean, reverse=True)


def draw(path: Path) -> None:
    """Accuracy against parameters, and against milliseconds for 10 s of audio."""
    from skill_fairseq.reporting.pictures import STYLES, drawing

    rows = [*read("reduced.csv"), *read("family.csv")]
    panels = {"parameters": (1e-3, "thousands of parameters"), "milliseconds": (1.0, "ms for 10 s of audio, one core")}
    with drawing(path, (9.0, 3.6)) as figure:
        for panel, (column, (scale, label)) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
            for (method, name), (colour, dashes, marker) in zip(METHODS.items(), STYLES):
                found = points(rows, method, column, scale)
                panel.plot(*zip(*found), color=colour, linestyle=dashes, marker=marker, markersize=5, label=name)
            (teacher,) = points(rows, "teacher", column, scale)
            panel.plot(*teacher, "*", color="black", markersize=13, linestyle="none", label="teacher")
            panel.axhline(CHANCE, color="#777777", linewidth=0.8, linestyle=":", label="chance")
            panel.set(xlabel=label, xscale="log", ylim=(0, 100))
            panel.set_xticks(TICKS[column], [str(tick) for tick in TICKS[column]])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("digits of unseen speakers, %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


TICKS = {"parameters": (30, 50, 100, 200, 500, 1000), "milliseconds": (10, 20, 50, 100)}

if __name__ == "__main__":
    draw(HERE / "overview.png")
