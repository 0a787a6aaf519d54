"""Hierarchical clustering of layers from their distances, and ways to cut the tree into groups.

Trees are scipy's linkage matrices: row m merges nodes Z[m, 0] and Z[m, 1] at height Z[m, 2] into node n + m,
which has Z[m, 3] leaves. Groups are lists of 0-based indices, each ascending, ordered by their first index.
"""

from __future__ import annotations

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

LINKAGES = ("average", "complete", "single", "ward")
EUCLIDEAN_MEASURES = ("l2",)

Groups = list[list[int]]


def check_linkage(method: str, measure: str) -> None:
    """Checks the method; Ward's criterion is a variance, so it needs Euclidean distances.

    Raises:
        ValueError: unknown method, or ward with a measure that is not Euclidean.
    """
    if method not in LINKAGES:
        raise ValueError(f"linkage: {method!r} is unknown; choose from {', '.join(LINKAGES)}")
    if method == "ward" and measure not in EUCLIDEAN_MEASURES:
        raise ValueError(
            f"linkage: ward needs a Euclidean measure, and {measure!r} is not; choose the measure "
            f"{' or '.join(EUCLIDEAN_MEASURES)}, or the linkage average, complete or single"
        )


def link(distances: np.ndarray, method: str = "average", neighbours_only: bool = False) -> np.ndarray:
    """The tree of merges.

    Args:
        distances: (n, n), symmetric, zero on the diagonal.
        method: one of :data:`LINKAGES`.
        neighbours_only: merge only clusters of neighbouring layers, so that each is a run of layers. Such a tree can
            have a merge lower than an earlier one; its height is then raised to the highest so far, which keeps the
            order of merges.

    Returns:
        (n - 1, 4) float64 linkage matrix.

    Raises:
        ValueError: fewer than two layers.
    """
    if len(distances) < 2:
        raise ValueError(f"linkage: {len(distances)} layer; at least 2 are needed to build groups")
    if neighbours_only:
        return _link_neighbours(distances, method)
    return hierarchy.linkage(squareform(distances, checks=False), method)


def _link_neighbours(distances: np.ndarray, method: str) -> np.ndarray:
    n = len(distances)
    runs = [(i, i + 1) for i in range(n)]  # [first, last), left to right
    nodes = list(range(n))
    merges = []
    height = 0.0
    while len(runs) > 1:
        gaps = [_between(distances, *a, *b, method) for a, b in zip(runs, runs[1:])]
        at = int(np.argmin(gaps))
        height = max(height, gaps[at])
        runs[at : at + 2] = [(runs[at][0], runs[at + 1][1])]
        merges.append([nodes[at], nodes[at + 1], height, runs[at][1] - runs[at][0]])
        nodes[at : at + 2] = [n + len(merges) - 1]
    return np.array(merges, dtype=float)


def _between(distances: np.ndarray, a: int, b: int, c: int, d: int, method: str) -> float:
    """Distance of the clusters [a, b) and [c, d), as scipy defines it for each method."""
    block = distances[a:b, c:d]
    if method == "single":
        return float(block.min())
    if method == "complete":
        return float(block.max())
    if method == "average":
        return float(block.mean())
    # Ward: the centroids' distance, from the points' distances, scaled by the clusters' sizes.
    squares = np.square(distances)
    centroids = squares[a:b, c:d].mean() - squares[a:b, a:b].mean() / 2 - squares[c:d, c:d].mean() / 2
    return float(np.sqrt(2 * (b - a) * (d - c) / (d - a) * max(centroids, 0.0)))


def cut_to_number(tree: np.ndarray, number: int) -> Groups:
    """Exactly ``number`` groups, also with ties: the tree without its last ``number - 1`` merges.

    Raises:
        ValueError: the number is not within 1..n.
    """
    n = len(tree) + 1
    if not 1 <= number <= n:
        raise ValueError(f"number of groups: {number}; expected 1 to {n}, the number of clustered layers")
    return _groups_after(tree, n - number)


def cut_at_height(tree: np.ndarray, height: float) -> Groups:
    """Groups of all merges up to ``height``, in the measure's unit.

    Raises:
        ValueError: the height is negative or not a number.
    """
    if not height >= 0:
        raise ValueError(f"height: {height}; expected 0 or more, the largest height being {tree[-1, 2]:.4g}")
    return _groups_after(tree, int((tree[:, 2] <= height).sum()))


def cut_by_silhouette(
    tree: np.ndarray, distances: np.ndarray, least: int, most: int
) -> tuple[Groups, dict[int, float]]:
    """The cut with the highest mean silhouette among ``least`` to ``most`` groups; in a tie, the fewest groups.

    Returns:
        the groups, and the silhouette for every number of groups.

    Raises:
        ValueError: the range is empty or not within 2..n - 1, where a silhouette is defined.
    """
    n = len(distances)
    if not 2 <= least <= most <= n - 1:
        raise ValueError(
            f"silhouette: from {least} to {most} groups; expected MIN <= MAX within 2 to {n - 1}, one less "
            "than the number of clustered layers"
        )
    scores = {number: silhouette(distances, cut_to_number(tree, number)) for number in range(least, most + 1)}
    return cut_to_number(tree, max(scores, key=lambda number: scores[number])), scores


def silhouette(distances: np.ndarray, groups: Groups) -> float:
    """Mean silhouette of all members (Rousseeuw 1987), from -1 to 1; a group of one counts 0.

    Args:
        distances: (n, n).
        groups: at least two, which together hold 0..n - 1.
    """
    total = 0.0
    for group in groups:
        if len(group) == 1:
            continue
        inner = distances[np.ix_(group, group)].sum(1) / (len(group) - 1)
        outer = np.min([distances[np.ix_(group, other)].mean(1) for other in groups if other is not group], axis=0)
        larger = np.maximum(inner, outer)
        total += float(np.divide(outer - inner, larger, out=np.zeros_like(larger), where=larger > 0).sum())
    return total / len(distances)


def cut_height(tree: np.ndarray, number: int) -> float:
    """A height that cuts the tree into ``number`` groups: midway between the last kept merge and the next."""
    heights = np.concatenate([[0.0], tree[:, 2]])
    kept = len(tree) + 1 - number
    return float(heights[kept] * 1.05 if number == 1 else (heights[kept] + heights[kept + 1]) / 2)


def _groups_after(tree: np.ndarray, merges: int) -> Groups:
    n = len(tree) + 1
    members: dict[int, list[int]] = {i: [i] for i in range(n)}
    for m in range(merges):
        members[n + m] = sorted(members.pop(int(tree[m, 0])) + members.pop(int(tree[m, 1])))
    return sorted(members.values())
