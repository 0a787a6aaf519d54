"""Trees and cuts against scipy, scikit-learn, exhaustive merging, and matrices with obvious groups."""

import itertools

import numpy as np
import pytest
from messages import says
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from skill_fairseq.clustering import linkage


def on_a_line(*points: float) -> np.ndarray:
    return np.abs(np.subtract.outer(points, points)).astype(float)


def random_distances(n: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((n, n)), 1)
    return upper + upper.T


PLAIN = on_a_line(0, 10, 11, 12, 30, 31, 32.5, 33, 60)
PLAIN_GROUPS = [[0], [1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("method", linkage.LINKAGES)
@pytest.mark.parametrize("neighbours_only", [False, True])
def test_plain_groups_are_found(method, neighbours_only):
    tree = linkage.link(PLAIN, method, neighbours_only)
    assert linkage.cut_to_number(tree, 4) == PLAIN_GROUPS
    height = linkage.cut_height(tree, 4)
    assert linkage.cut_at_height(tree, height) == PLAIN_GROUPS
    groups, scores = linkage.cut_by_silhouette(tree, PLAIN, 2, 8)
    assert groups == linkage.cut_to_number(tree, max(scores, key=lambda k: scores[k]))


def test_layers_that_are_not_neighbours_may_share_a_group():
    distances = on_a_line(0, 5, 0.1, 5.2, 9)
    assert linkage.cut_to_number(linkage.link(distances), 3) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize("method", linkage.LINKAGES)
@pytest.mark.parametrize("seed", range(5))
def test_tree_is_scipys(method, seed):
    distances = random_distances(9, seed)
    np.testing.assert_array_equal(linkage.link(distances, method), hierarchy.linkage(squareform(distances), method))


@pytest.mark.parametrize("method", linkage.LINKAGES)
def test_neighbours_only_is_scipys_where_neighbours_are_nearest(method):
    """On a line each merge joins neighbours anyway, so the constraint changes nothing (also for Ward)."""
    distances = on_a_line(*np.sort(np.random.default_rng(4).random(12)))
    ours, scipys = linkage.link(distances, method, neighbours_only=True), linkage.link(distances, method)
    np.testing.assert_allclose(ours[:, 2:], scipys[:, 2:], rtol=1e-12)
    for number in range(1, 13):
        assert linkage.cut_to_number(ours, number) == linkage.cut_to_number(scipys, number)


def merge_neighbours(distances, method, number):
    """Exhaustive: the best of all pairs of clusters whose union is a run of layers."""
    between = {"average": np.mean, "complete": np.max, "single": np.min}[method]
    clusters = [frozenset([i]) for i in range(len(distances))]
    while len(clusters) > number:
        allowed = [(a, b) for a, b in itertools.combinations(clusters, 2) if max(a | b) - min(a | b) == len(a | b) - 1]
        a, b = min(allowed, key=lambda pair: between(distances[np.ix_(sorted(pair[0]), sorted(pair[1]))]))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return sorted(sorted(c) for c in clusters)


@pytest.mark.parametrize("method", ["average", "complete", "single"])
@pytest.mark.parametrize("seed", range(6))
def test_neighbours_only_equals_exhaustive_merging(method, seed):
    distances = random_distances(8, seed)
    tree = linkage.link(distances, method, neighbours_only=True)
    assert hierarchy.is_valid_linkage(tree) and hierarchy.is_monotonic(tree)
    free = [linkage.cut_to_number(linkage.link(distances, method), k) for k in range(1, 9)]
    ours = [linkage.cut_to_number(tree, k) for k in range(1, 9)]
    assert ours == [merge_neighbours(distances, method, k) for k in range(1, 9)]
    assert all(group == list(range(group[0], group[-1] + 1)) for groups in ours for group in groups)
    assert ours != free


@pytest.mark.parametrize("number", range(1, 7))
def test_ties_still_give_the_number_asked_for(number):
    equal = 1 - np.eye(6)
    for neighbours_only in (False, True):
        groups = linkage.cut_to_number(linkage.link(equal, "average", neighbours_only), number)
        assert len(groups) == number and sorted(sum(groups, [])) == list(range(6))


@pytest.mark.parametrize("seed", range(4))
def test_cut_at_height_is_scipys(seed):
    tree = linkage.link(random_distances(10, seed), "complete")
    for height in [0, 0.2, 0.5, float(tree[4, 2]), 2]:
        labels = hierarchy.fcluster(tree, height, "distance")
        expected = sorted([i for i in range(10) if labels[i] == label] for label in set(labels))
        assert linkage.cut_at_height(tree, height) == expected
    for number in range(1, 11):
        assert len(linkage.cut_at_height(tree, linkage.cut_height(tree, number))) == number


@pytest.mark.parametrize("seed", range(4))
def test_silhouette_is_scikit_learns(seed):
    from sklearn.metrics import silhouette_score

    distances = random_distances(9, seed)
    tree = linkage.link(distances)
    for number in range(2, 9):
        groups = linkage.cut_to_number(tree, number)
        labels = [next(g for g, group in enumerate(groups) if i in group) for i in range(9)]
        expected = silhouette_score(distances, labels, metric="precomputed")
        assert linkage.silhouette(distances, groups) == pytest.approx(expected, abs=1e-12)


def test_best_silhouette_finds_the_plain_number():
    distances = on_a_line(0, 1, 2, 20, 21, 22, 40, 41, 42, 60, 61, 62)
    groups, scores = linkage.cut_by_silhouette(linkage.link(distances), distances, 2, 8)
    assert groups == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert sorted(scores) == [2, 3, 4, 5, 6, 7, 8] and max(scores.values()) == scores[4]


def test_equal_layers_have_no_silhouette_but_no_nan_either():
    assert linkage.silhouette(np.zeros((4, 4)), [[0, 1], [2, 3]]) == 0


def test_clear_errors():
    tree = linkage.link(PLAIN)
    with pytest.raises(ValueError, match=says("ward", "'cka'", "measure l2")):
        linkage.check_linkage("ward", "cka")
    linkage.check_linkage("ward", "l2")
    with pytest.raises(ValueError, match=says("linkage", "'median'", "average")):
        linkage.check_linkage("median", "l2")
    with pytest.raises(ValueError, match=says("groups: 10", "1 to 9")):
        linkage.cut_to_number(tree, 10)
    with pytest.raises(ValueError, match=says("groups: 0", "1 to 9")):
        linkage.cut_to_number(tree, 0)
    with pytest.raises(ValueError, match=says("height: -1")):
        linkage.cut_at_height(tree, -1)
    for least, most in [(1, 3), (4, 3), (2, 9)]:
        with pytest.raises(ValueError, match=says(f"{least} to {most}", "MIN <= MAX", "2 to 8")):
            linkage.cut_by_silhouette(tree, PLAIN, least, most)
    with pytest.raises(ValueError, match=says("1 layer", "at least 2")):
        linkage.link(np.zeros((1, 1)))
