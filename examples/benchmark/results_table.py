"""Means and 95 % intervals of committed runs, as a CSV and a picture; shared by the scripts in results/."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from skill_fairseq.comparison.statistics import Estimate
from skill_fairseq.files import atomic_write


class Line(NamedTuple):
    """One line of the CSV: a measure of a method at a size.

    Attributes:
        sparsity: the size, or several that the mean is over.
        method: name in grid.yaml.
        seeds: number of runs at each size.
        measure: column of the runs.
        mean: over seeds and speakers.
        interval: ends of the 95 % interval of the mean; None with too few speakers.
        difference: mean difference to the baseline, paired by seed and speaker; None for the baseline itself.
        difference_interval: the ends of its interval.
    """

    sparsity: str
    method: str
    seeds: int
    measure: str
    mean: float
    interval: Optional[tuple[float, float]] = None
    difference: Optional[float] = None
    difference_interval: Optional[tuple[float, float]] = None


HEAD = ["sparsity", "method", "seeds", "measure", "mean", "low", "high"]
HEAD += ["difference", "difference low", "difference high"]


def read_runs(path: Path) -> list[dict[str, str]]:
    """A CSV of runs."""
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def ends(found: Estimate) -> Optional[tuple[float, float]]:
    """Both ends of an interval, or None."""
    return None if found.low is None or found.high is None else (found.low, found.high)


def write_table(path: Path, lines: Sequence[Line], size: str = HEAD[0]) -> None:
    """Writes the CSV, rates and distances as fractions with six digits; ``size`` names the first column."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([size, *HEAD[1:]])
        for line in lines:
            low, high = line.interval or (None, None)
            less, more = line.difference_interval or (None, None)
            numbers = (line.mean, low, high, line.difference, less, more)
            writer.writerow([*line[:4], *("" if number is None else _shown(number) for number in numbers)])


def _shown(number: float) -> str:
    return f"{round(number, 6) + 0.0:.6f}".rstrip("0").rstrip(".")


def draw_dots(
    path: Path,
    panels: Mapping[str, Sequence[tuple[str, int, float, Optional[tuple[float, float]]]]],
    series: Sequence[str] = ("",),
    reference: Optional[Mapping[str, float]] = None,
    reference_label: str = "",
) -> None:
    """Dots with intervals, one row per method and one panel per measure.

    Args:
        path: PNG file to write.
        panels: label of each panel -> its dots: row, number of the series, value, interval. Rows appear from top to
            bottom in the order of their first dot.
        series: labels of the series, each with its colour.
        reference: label of a panel -> position of its vertical line.
        reference_label: label of the line.
    """
    from skill_fairseq.reporting.pictures import STYLES, drawing

    rows = list(dict.fromkeys(dot[0] for dots in panels.values() for dot in dots))
    with drawing(path, (2.4 + 1.7 * len(panels), 1.0 + 0.26 * len(rows) + 0.1 * len(series))) as figure:
        axes: Sequence[Any] = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (label, dots) in zip(axes, panels.items()):
            for number, name in enumerate(series):
                mine = [dot for dot in dots if dot[1] == number]
                places = [rows.index(dot[0]) + 0.22 * (number - (len(series) - 1) / 2) for dot in mine]
                colour, _, marker = STYLES[number]
                style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none", "label": name}
                panel.plot([dot[2] for dot in mine], places, **style)
                known = [(dot[3], place) for dot, place in zip(mine, places) if dot[3] is not None]
                if known:
                    low, high = np.array([interval for interval, _ in known]).T
                    panel.hlines([place for _, place in known], low, high, color=colour, linewidth=1.1)
            if reference and label in reference:
                panel.axvline(reference[label], color="#777777", linewidth=1, zorder=0, label=reference_label)
            panel.set_xlabel(label, fontsize=8)
            panel.tick_params(labelsize=8)
            panel.grid(axis="y", color="#E8E8E8", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        known_labels = [(handle, label) for handle, label in zip(handles, labels) if label]
        if known_labels:
            columns = min(5, 1 + len(panels))
            figure.legend(*zip(*known_labels), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
