"""The report's PNG pictures, drawn without a display."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from skill_fairseq.clustering.plot import COLOURS, GREY
from skill_fairseq.files import atomic_write

Curve = tuple[Sequence[float], Sequence[float]]
Bounded = tuple[float, Optional[float], Optional[float]]
"""A value, and the ends of its interval or None."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
MARKERS = "os^Dv<>P"
STYLES = tuple(
    (colour, dashes, MARKERS[(i + j) % len(MARKERS)])
    for j, dashes in enumerate(DASHES)
    for i, colour in enumerate(COLOURS)
)
"""Colour, line style and marker of each curve: 32 combinations, any two of which differ in at least two of these."""
MOST_MARKERS = 13
MOST_INSIDE, LONGEST_BESIDE = 2, 19  # lines of a legend inside the axes; characters of two names side by side
WIDTH = 4.4  # inches: on a phone 10 pt are then about 10 pixels
DPI = 220
MOST_IN_LINE = 44  # characters of that width


def file_of(out: Path, *words: str) -> Path:
    """A PNG path inside a folder: words may come from a file, hold any characters, and have any length.

    Keeps letters, digits and ``. _ -``; if others were dropped, a hash keeps names distinct.
    """
    name = "_".join(words)
    safe = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:100]
    if safe != name:
        safe += f"-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return out / f"{safe}.png"


@contextlib.contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yields a matplotlib figure, and saves it when the block ends.

    Args:
        path: file to write.
        size: inches.
    """
    from matplotlib import rc_context  # an optional dependency; without pyplot no display is needed
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # a $ in a name is not a formula
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        yield figure
        with atomic_write(path) as temporary:
            figure.savefig(temporary)


def draw(path: Path, painter: Callable[[Any], None], size: tuple[float, float]) -> Path:
    """Saves what the painter draws on matplotlib axes; returns the path.

    Args:
        path: PNG file to write.
        painter: called with the axes.
        size: inches.
    """
    with drawing(path, size) as figure:
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E8E8E8", lw=0.6)
        axes.set_axisbelow(True)
        painter(axes)
    return path


def curves(
    path: Path,
    lines: Mapping[str, Curve],
    ylabel: str,
    dashed: Sequence[str] = (),
    xlabel: str = "update",
    log: bool = False,
) -> Path:
    """Lines over updates, or over layers.

    Args:
        path: PNG file to write.
        lines: label -> x and y values; at most 32 look different from each other.
        ylabel, xlabel: axis labels.
        dashed: labels of lines to draw dashed and grey, such as a target.
        log: logarithmic y axis, if all values are above 0.
    """
    below = len(lines) > MOST_INSIDE
    columns = 2 if max(map(len, lines), default=0) <= LONGEST_BESIDE else 1
    rows = -(-len(lines) // columns) if below else 0

    def paint(axes: Any) -> None:
        draw_curves(axes, lines, dashed)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log and all(value > 0 for _, y in lines.values() for value in y):
            _log_axis(axes)
        if below:  # inside it would hide the lines
            place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
            axes.figure.legend(**place, frameon=False, fontsize=9, handlelength=3.2)
        elif len(lines) > 1:
            axes.legend(frameon=False)

    return draw(path, paint, (WIDTH, 3.0 + 0.17 * rows))


def pareto(path: Path, lines: Mapping[str, Curve], ylabel: str) -> Path:
    """Quality against cost: one line per training method, one point per size, G MACs on a logarithmic x axis."""

    def paint(axes: Any) -> None:
        for (label, (x, y)), (colour, dashes, marker) in zip(lines.items(), STYLES):
            axes.plot(x, y, color=colour, ls=dashes, marker=marker, label=label)
        axes.set(xlabel="G multiply-accumulates for 10 s of audio", ylabel=ylabel, xscale="log")
        _log_ticks(axes.xaxis)
        axes.legend(frameon=False)

    return draw(path, paint, (6.4, 4.2))


def draw_curves(axes: Any, lines: Mapping[str, Curve], dashed: Sequence[str] = ()) -> None:
    """Draws the lines, each in its own style; those of ``dashed`` in grey."""
    styles = itertools.cycle(STYLES)
    for label, (x, y) in lines.items():
        if label in dashed:
            axes.plot(x, y, color=GREY, ls=(0, (4, 3)), lw=1.5, label=label)
            continue
        colour, dashes, marker = next(styles)
        every = -(-len(x) // MOST_MARKERS) or 1
        axes.plot(x, y, color=colour, ls=dashes, lw=1.7, marker=marker, ms=3.5, markevery=every, label=label)


def _log_axis(axes: Any) -> None:
    axes.set_yscale("log")
    _log_ticks(axes.yaxis)


def _log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5, without exponents."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def kept_units(path: Path, shares: Mapping[str, Sequence[Optional[float]]]) -> Path:
    """Share of units left in each layer, one panel per kind.

    Args:
        path: PNG file to write.
        shares: kind -> share in [0, 1] of each layer; None where the whole sublayer is gone.
    """
    counts = [len(values) for values in shares.values()]
    with drawing(path, (WIDTH, 1.2 + 0.17 * sum(counts))) as figure:
        panels = figure.subplots(len(shares), 1, squeeze=False, height_ratios=counts)
        for panel, (kind, values), colour in zip(panels[:, 0], shares.items(), COLOURS):
            places = np.arange(len(values))
            panel.barh(places, [100.0] * len(values), color="#EFEFEF", height=0.8)
            panel.barh(places, [100 * (value or 0.0) for value in values], color=colour, height=0.8)
            first = 0 if kind.startswith("conv") else 1
            panel.set_yticks(places, [str(place + first) for place in places], fontsize=8)
            panel.set_ylim(len(values) - 0.5, -0.5)
            panel.set(xlim=(0, 100), ylabel=kind)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(axis="y", length=0)
        panels[-1, 0].set_xlabel("units left, %")
    return path


def forest(
    path: Path, rows: Sequence[tuple[str, Bounded]], xlabel: str, reference: Optional[float], zoom: bool = False
) -> Path:
    """Values with intervals, one per line, from the top.

    Args:
        path: PNG file to write.
        rows: label and value; without an interval only the value is drawn, in grey.
        xlabel: axis label.
        reference: position of a vertical line: 0 for differences, or a teacher's value; None: no line.
        zoom: write outliers at the edge if drawing them would squeeze the other rows.
    """

    def paint(axes: Any) -> None:
        far = beyond(rows, reference) if zoom and reference is not None else []
        for place, (_, (value, low, high)) in enumerate(rows):
            bare = low is None or high is None
            outside = reference is not None and low is not None and high is not None and not low <= reference <= high
            colour = (COLOURS[1] if value < reference else COLOURS[0]) if outside and reference is not None else GREY
            if place in far:
                left = reference is not None and value < reference
                said = f"{value:+.1f}" if bare else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
                axes.annotate(
                    f"\u25c2 {said}" if left else f"{said} \u25b8",
                    (0.0 if left else 1.0, place),
                    xycoords=("axes fraction", "data"),
                    xytext=(3 if left else -3, 0),
                    textcoords="offset points",
                    ha="left" if left else "right",
                    va="center",
                    color=colour,
                    bbox={"fc": "white", "ec": "none", "pad": 1},
                )
                continue
            if not bare:
                axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="round")
            axes.plot([value], [place], "o", color=colour, ms=5)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.figure.supxlabel(textwrap.fill(xlabel, MOST_IN_LINE), fontsize="medium")  # may be wider than the axes
        axes.grid(visible=False, axis="y")
        if reference is not None:
            axes.axvline(reference, color="#222222", lw=1, ls=(0, (4, 3)), zorder=0)

    return draw(path, paint, (WIDTH, 0.7 + 0.27 * len(rows)))


def in_percent(value: float, low: Optional[float], high: Optional[float]) -> Bounded:
    """A rate of 0 to 1 as :func:`forest` draws it."""
    return 100 * value, None if low is None else 100 * low, None if high is None else 100 * high


def beyond(rows: Sequence[tuple[str, Bounded]], reference: float) -> list[int]:
    """Outliers: rows whose intervals (or values, without one) reach more than three times as far from the reference as
    all others; always fewer than half of the rows."""
    reaches = [max(abs(n - reference) for n in numbers if n is not None) for _, numbers in rows]
    order = sorted(range(len(rows)), key=reaches.__getitem__)
    for i in range(len(order) - 1, 0, -1):
        if 2 * i > len(order) and reaches[order[i]] > 3 * reaches[order[i - 1]] > 0:
            return sorted(order[i:])
    return []
