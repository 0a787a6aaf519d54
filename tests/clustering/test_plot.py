"""The content of the plot."""

import re

import numpy as np
import pytest

from skill_fairseq.clustering import linkage
from skill_fairseq.clustering.plot import leaf_order, plot_clusters


def on_a_line(*points: float) -> np.ndarray:
    return np.abs(np.subtract.outer(points, points)).astype(float)


def test_runs_of_layers_stay_in_order():
    assert leaf_order(linkage.link(on_a_line(0, 1, 5, 6, 7, 30, 31))) == list(range(7))
    distances = np.random.default_rng(0).random((12, 12))
    assert leaf_order(linkage.link(distances + distances.T, neighbours_only=True)) == list(range(12))


@pytest.mark.parametrize("seed", range(4))
def test_branches_do_not_cross(seed):
    """In every cut, each group's leaves are consecutive."""
    distances = np.random.default_rng(seed).random((9, 9))
    tree = linkage.link(np.triu(distances, 1) + np.triu(distances, 1).T)
    order = leaf_order(tree)
    assert sorted(order) == list(range(9))
    for number in range(1, 10):
        for group in linkage.cut_to_number(tree, number):
            rows = sorted(order.index(leaf) for leaf in group)
            assert rows == list(range(rows[0], rows[0] + len(group)))


def texts(svg: str) -> list:
    """All text of a picture; matplotlib draws it as paths and names it in comments."""
    return re.findall(r"<!-- (.*?) -->", svg)


@pytest.mark.parametrize("measure, corner", [("cosine", ".40"), ("l1", ".60")])
def test_picture_shows_values_layers_and_cut(tmp_path, measure, corner):
    distances = on_a_line(0, 0.1, 0.5, 0.6)
    tree = linkage.link(distances)
    file = tmp_path / "clusters.svg"
    plot_clusters(file, distances, tree, [[0, 1], [2, 3]], 0.3, [1, 2, 3, 4], measure, "the title")
    shown = texts(file.read_text())
    assert shown.count(corner) == 2  # layers 1 and 4, as similarity if the measure has one
    assert shown[:4] == ["1", "2", "3", "4"]
    assert "cut at 0.3" in shown and "the title" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["clusters.svg"]


def test_many_layers_get_no_numbers(tmp_path):
    distances = on_a_line(*np.linspace(0, 0.9, 25))
    tree = linkage.link(distances)
    groups = linkage.cut_to_number(tree, 9)
    file = tmp_path / "clusters.svg"
    plot_clusters(file, distances, tree, groups, linkage.cut_height(tree, 9), list(range(25)), "l2", "t")
    shown = texts(file.read_text())
    assert not any(text.startswith(".") for text in shown)
    assert all(shown.count(str(layer)) >= 3 for layer in range(25))  # both axes of the map, and the tree
