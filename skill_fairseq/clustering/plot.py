"""The plot of a clustering: a heat map of layer similarity beside the dendrogram with its cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from skill_fairseq.files import PathLike, atomic_write
from skill_fairseq.objectives.groups import Layer

NAMES = {
    "cka": "linear CKA",
    "cka_minibatch": "linear CKA",
    "cosine": "cosine similarity",
    "l1": "L1 distance",
    "l2": "L2 distance",
    "loss": "distillation loss",
}
_SIMILARITIES = ("cka", "cka_minibatch", "cosine")  # at most 1: the heat map shows 1 - distance

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#7A1F5C")
"""Six colours of Okabe and Ito's palette and two dark ones, which colour-blind readers can tell apart."""
GREY = "#8A8A8A"
_MOST_LAYERS_WITH_NUMBERS = 16  # more would be too small to read


def plot_clusters(
    path: PathLike,
    distances: np.ndarray,
    tree: np.ndarray,
    groups: Sequence[Sequence[int]],
    height: float,
    layers: Sequence[Layer],
    measure: str,
    title: str,
) -> None:
    """Writes the plot.

    Rows follow the layers' order as far as a tree without crossings allows; always if groups are runs of layers.

    Args:
        path: file to write; its suffix sets the format.
        distances: (n, n).
        tree: (n - 1, 4) linkage matrix of these distances.
        groups: lists of indices into the n.
        height: height of the cut.
        layers: names of the n layers.
        measure: name of the distances.
        title: one line above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # an optional dependency; without pyplot no display is needed
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    order = leaf_order(tree)
    rows = {leaf: row for row, leaf in enumerate(order)}
    colours = {leaf: COLOURS[g % len(COLOURS)] for g, group in enumerate(groups) for leaf in group}
    side = float(np.clip(0.42 * len(order), 4.0, 6.0))
    figure = Figure(
        figsize=(2.1 * side + 0.6, side + 0.9),
        dpi=160,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    grid = figure.add_gridspec(1, 2, width_ratios=[1.2, 1.0])
    heat, dendrogram = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])

    _draw_heat_map(figure, heat, distances[np.ix_(order, order)], measure)
    _draw_boxes(heat, groups, rows, colours)
    _draw_dendrogram(dendrogram, tree, rows, colours, height)
    dendrogram.set_title("dendrogram", fontsize=10)
    dendrogram.set_xlabel(("1 − " if measure in _SIMILARITIES else "") + NAMES[measure])
    heat.set_ylabel("layer")
    heat.set_xlabel("layer")
    for axis in (heat.xaxis, heat.yaxis, dendrogram.yaxis):
        axis.set_ticks(range(len(order)))
        axis.set_ticklabels([str(layers[leaf]) for leaf in order])
        for leaf, label in zip(order, axis.get_ticklabels()):
            label.set(color=colours[leaf], fontweight="bold")
    shown = title.encode(errors="backslashreplace").decode()  # a file name may not be valid text
    figure.suptitle(shown, fontsize=12, parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def leaf_order(tree: np.ndarray) -> list[int]:
    """The tree's leaves, ordered without crossings: at each merge the side with the lower mean layer comes first."""
    n = len(tree) + 1
    leaves: dict[int, list[int]] = {i: [i] for i in range(n)}
    for m, (a, b) in enumerate(tree[:, :2].astype(int)):
        first, second = sorted((leaves[a], leaves[b]), key=lambda side: (np.mean(side), side))
        leaves[n + m] = first + second
    return leaves[2 * n - 2]


def _draw_heat_map(figure: Any, axes: Any, distances: np.ndarray, measure: str) -> None:
    similar = measure in _SIMILARITIES
    shown = 1.0 - distances if similar else distances
    image = axes.imshow(shown, cmap="YlGnBu" if similar else "YlGnBu_r")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(NAMES[measure], fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.02).outline.set_visible(False)
    if len(shown) > _MOST_LAYERS_WITH_NUMBERS:
        return
    for i, row in enumerate(shown):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            axes.text(
                j,
                i,
                _short(value),
                ha="center",
                va="center",
                fontsize=9 if len(shown) < 15 else 8,
                color="black" if bright else "white",
            )


def _short(value: float) -> str:
    """At most two decimals, no leading zero: .93, 1, 12."""
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.2f}".replace("0.", ".", 1).replace("1.00", "1").replace("-.00", ".00")


def _draw_boxes(axes: Any, groups: Sequence[Sequence[int]], rows: dict[int, int], colours: dict[int, str]) -> None:
    """Draws a frame in the group's colour around each group's block (a group's rows are always together)."""
    from matplotlib.patches import Rectangle

    for group in groups:
        start, size = min(rows[leaf] for leaf in group) - 0.5, len(group)
        for width, colour in (
            (5.0, "white"),
            (2.4, colours[group[0]]),
        ):  # a white seam, to stand out from the map
            frame = Rectangle((start, start), size, size, fill=False, lw=width, ec=colour, clip_on=False, zorder=3)
            axes.add_patch(frame)


def _draw_dendrogram(axes: Any, tree: np.ndarray, rows: dict[int, int], colours: dict[int, str], height: float) -> None:
    """Draws the tree, one leaf per row of the heat map, with branches below the cut in their group's colour."""
    n = len(rows)
    nodes: dict[int, tuple[float, float, str]] = {leaf: (0.0, float(row), colours[leaf]) for leaf, row in rows.items()}
    for m, (a, b, at, _) in enumerate(tree):
        (x1, y1, c1), (x2, y2, c2) = nodes[int(a)], nodes[int(b)]
        below = at <= height
        for x, y, colour in ((x1, y1, c1), (x2, y2, c2)):
            # A branch that the cut crosses belongs to its group up to the cut.
            inside = at if below else max(x, min(at, height))
            axes.plot([x, inside], [y, y], color=colour, lw=2, solid_capstyle="round")
            axes.plot([inside, at], [y, y], color=GREY, lw=1.4, zorder=1)
        colour = c1 if below else GREY
        axes.plot([at, at], [y1, y2], color=colour, lw=2 if below else 1.4, zorder=2 if below else 1)
        nodes[n + m] = (at, (y1 + y2) / 2, colour)
    right = 1.06 * max(tree[-1, 2], height, 1e-12)
    axes.axvline(height, color="#222222", lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"cut at {height:.3g}",
        (height, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        fontsize=9,
        bbox={"fc": "white", "ec": "none", "pad": 1},
    )
    axes.set_xlim(0, right)
    axes.set_ylim(n - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)
