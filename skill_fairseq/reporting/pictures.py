"""The report's pictures, PNG, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from skill_fairseq.files import atomic_write

Curve = tuple[Sequence[float], Sequence[float]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4FC9", "#8C6D31")  # Okabe and Ito
GREY = "#8A8A8A"


def draw(path: Path, painter: Callable[[Any], None], size: tuple[float, float] = (5.4, 3.6)) -> Path:
    """Saves what the painter draws on a set of axes.

    Args:
        path: PNG file to write.
        painter: called with matplotlib's axes.
        size: in inches.

    Returns:
        the path.
    """
    from matplotlib.figure import Figure  # an extra; without pyplot no display is needed

    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E8E8E8", lw=0.6)
    axes.set_axisbelow(True)
    painter(axes)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
    return path


def curves(
    path: Path, lines: Mapping[str, Curve], ylabel: str, dashed: Sequence[str] = (), xlabel: str = "update"
) -> Path:
    """Lines over updates, or over layers.

    Args:
        path: PNG file to write.
        lines: label -> x and y values.
        ylabel, xlabel: of the axes.
        dashed: labels of lines to draw dashed and grey, such as a target.
    """

    def paint(axes: Any) -> None:
        colours = iter(COLOURS * (1 + len(lines) // len(COLOURS)))
        for label, (x, y) in lines.items():
            if label in dashed:
                axes.plot(x, y, color=GREY, ls=(0, (4, 3)), lw=1.5, label=label)
            else:
                axes.plot(x, y, color=next(colours), lw=1.8, marker="o" if len(x) < 30 else None, ms=3, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8 if len(lines) > 4 else 9)

    return draw(path, paint)


def kept_units(path: Path, shares: Mapping[str, Sequence[Optional[float]]]) -> Path:
    """Share of units left in each layer, a panel a kind.

    Args:
        path: PNG file to write.
        shares: kind -> share in [0, 1] of each layer; None where the whole sublayer is gone.
    """
    from matplotlib.figure import Figure

    rows = sum(len(values) for values in shares.values())
    figure = Figure(figsize=(5.4, 1.2 + 0.17 * rows), dpi=160, layout="constrained")
    panels = figure.subplots(len(shares), 1, squeeze=False, height_ratios=[len(values) for values in shares.values()])
    for panel, (kind, values), colour in zip(panels[:, 0], shares.items(), COLOURS):
        places = np.arange(len(values))
        panel.barh(places, [100.0] * len(values), color="#EFEFEF", height=0.8)
        panel.barh(places, [100 * (value or 0.0) for value in values], color=colour, height=0.8)
        first = 0 if kind.startswith("conv") else 1
        panel.set_yticks(places, [str(place + first) for place in places], fontsize=7)
        panel.set_ylim(len(values) - 0.5, -0.5)
        panel.set(xlim=(0, 100), ylabel=kind)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[-1, 0].set_xlabel("units left, %")
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
    return path


def forest(path: Path, rows: Sequence[tuple[str, Sequence[float]]], xlabel: str, reference: Optional[float]) -> Path:
    """Values with intervals, one a line, from the top.

    Args:
        path: PNG file to write.
        rows: label, and value, low and high.
        xlabel: of the axis.
        reference: where a vertical line stands: 0 for differences, a teacher's value; None: no line.
    """

    def paint(axes: Any) -> None:
        for place, (_, (value, low, high)) in enumerate(rows):
            outside = reference is not None and not low <= reference <= high
            colour = (COLOURS[1] if value < reference else COLOURS[0]) if outside and reference is not None else GREY
            axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="round")
            axes.plot([value], [place], "o", color=colour, ms=5)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        axes.grid(visible=False, axis="y")
        if reference is not None:
            axes.axvline(reference, color="#222222", lw=1, ls=(0, (4, 3)), zorder=0)

    return draw(path, paint, (5.4, 1.0 + 0.32 * len(rows)))
