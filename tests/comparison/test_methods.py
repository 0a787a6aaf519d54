"""What each method distils."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from messages import says
from methods import (
    METHODS,
    Recipe,
    Target,
    check_methods,
    cluster_again,
    equal_runs,
    random_groups,
    read_methods,
    spread_layers,
    target_of,
)

from skill_fairseq.clustering.similarity import MEASURES

SKILL = [[0], [1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]


def clusters(**changes: Any) -> dict[str, Any]:
    """As skill-cluster --compare writes them: by l1, layers are on a line with gaps before 5 and 9 and 12."""
    points = np.array([0, 1, 2, 3, 4, 20, 21, 22, 23, 40, 41, 42, 60])
    line = np.abs(np.subtract.outer(points, points)).astype(float).tolist()
    return {
        "groups": SKILL,
        "layers": list(range(13)),
        "matrices": dict.fromkeys(MEASURES, line),
        "measure": "l1",
        "settings": {"linkage": "average", "neighbours_only": False},
        **changes,
    }


def test_groups_by_name() -> None:
    targets = {name: target_of(name, clusters(), seed=1) for name in METHODS}
    assert targets["skill"].groups == SKILL
    assert targets["dphubert"][:2] == ([[0], [4], [8], [12]], [0, 1, 1, 1])
    assert targets["single_layers"][:2] == ([[0], [4], [8], [12]], "none")
    assert targets["all_layers"].groups == [[layer] for layer in range(13)]
    assert targets["last_layer"].groups == [[12]]
    assert targets["equal_runs"].groups == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert targets["no_distillation"].groups is None
    assert all(target.stage1 == target.stage2 == () for target in targets.values())


def test_a_variant_changes_what_it_names() -> None:
    variants: dict[str, Any] = {
        "by_l1": {"clustering": {"measure": "l1"}},
        "shared": {"projection_sharing": "all"},
        "half": {"of": "dphubert", "both": ["a=1"], "stage1": ["b=2"], "stage2": ["c=3"]},
    }
    found = {name: target_of(name, clusters(), 1, variants)[:4] for name in variants}
    assert found["by_l1"] == ([[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11], [12]], "none", (), ())
    assert found["shared"] == (SKILL, "all", (), ())
    assert found["half"] == ([[0], [4], [8], [12]], [0, 1, 1, 1], ("a=1", "b=2"), ("a=1", "c=3"))


def test_recipes_are_methods_of_one_line() -> None:
    entries = ["skill", {"thin": "distill/tiny_starhubert"}, {"two": {"config": "distill/x", "overrides": ["a.b=1"]}}]
    names, recipes = read_methods(entries, "grid")
    assert names == ["skill", "thin", "two"]
    assert recipes == {"thin": Recipe("distill/tiny_starhubert"), "two": Recipe("distill/x", ("a.b=1",))}
    targets = {name: target_of(name, clusters(), 1, {}, recipes) for name in (*names, "no_distillation")}
    assert targets["two"] == Target(None, "none", ("a.b=1",), (), "distill/x")
    _, later = read_methods([{"both": {"config": "distill/x", "then": "finetune/y"}}], "grid")
    both = target_of("both", clusters(), 1, {}, later)
    assert (both.recipe, both.then) == ("distill/x", "finetune/y") and both.to_dict()["then"] == "finetune/y"
    assert "then" not in targets["two"].to_dict()
    assert [target.trained for target in targets.values()] == [True, True, True, False]
    assert "recipe" not in targets["skill"].to_dict() and targets["thin"].to_dict()["recipe"].endswith("starhubert")


@pytest.mark.parametrize(
    "entry", [{"a": 3}, {"a": {"overrides": []}}, {"a": {"config": "x", "more": 1}}, {"skill": "x"}]
)
def test_bad_recipes_are_refused_by_name(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=says("grid", f"methods.{next(iter(entry))}")):
        read_methods(["skill", entry], "grid")


def test_clustering_again_by_other_options() -> None:
    assert cluster_again(clusters(), num_groups=2) == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12]]
    # Points 40..42 and 60 are 19 apart on average, 0..4 and 20..23 19.5; by their nearest points it is 18 and 16.
    assert cluster_again(clusters(), num_groups=3) == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert cluster_again(clusters(), linkage="single", num_groups=3) == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11], [12]]
    assert cluster_again(clusters(), layer_0=False)[0] == [1, 2, 3, 4]
    # Layers 0 and 2 are alike, 1 differs from both: only the neighbour constraint keeps them from joining.
    far = clusters(layers=[0, 1, 2], groups=[[0], [1]], matrices={"l1": [[0, 9, 1], [9, 0, 8], [1, 8, 0]]})
    assert cluster_again(far) == [[0, 2], [1]]
    assert cluster_again(far, neighbours_only=True) == [[0], [1, 2]]


def test_random_groups_have_the_sizes_and_every_layer_and_follow_the_seed() -> None:
    found = [random_groups([1, 2, 5, 5], range(13), seed) for seed in (1, 2, 3)]
    for groups in found:
        assert [len(group) for group in groups] == [1, 2, 5, 5]
        assert sorted(sum(groups, [])) == list(range(13)) and groups == [sorted(group) for group in groups]
    assert found[0] != found[1] != found[2] and found[0] == random_groups([1, 2, 5, 5], range(13), 1)


@pytest.mark.parametrize("depth, layers", [(12, [0, 4, 8, 12]), (24, [0, 8, 16, 24]), (3, [0, 1, 2, 3]), (1, [0, 1])])
def test_layers_are_spread_over_the_depth(depth: int, layers: list[int]) -> None:
    assert spread_layers(depth) == layers


def test_runs_of_equal_size() -> None:
    assert equal_runs([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]


def test_layers_left_out_of_the_clustering_stay_out() -> None:
    without = clusters(groups=[[1, 2], [3]], layers=[1, 2, 3])
    assert target_of("all_layers", without, 1).groups == [[1], [2], [3]]
    assert target_of("equal_runs", without, 1).groups == [[1, 2], [3]]


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=says("methods", "'skil'", "skill")):
        target_of("skil", clusters(), 1)
    with pytest.raises(ValueError, match=says("l1", "'cka'", "skill-cluster --compare")):
        cluster_again(clusters(matrices={"l1": []}), measure="cka")
    with pytest.raises(ValueError, match=says("ward", "'l1'", "measure l2")):
        cluster_again(clusters(), linkage="ward")


@pytest.mark.parametrize(
    "variant, said",
    [
        ({"clusters": {}}, ["variants.x", "{'clusters': {}}", "of, clustering"]),
        ({"of": "y"}, ["variants.x.of", "'y'", "skill"]),
        ({"clustering": {"k": 3}}, ["variants.x.clustering", "{'k': 3}", "measure, linkage, num_groups"]),
        ({"of": "dphubert", "clustering": {"num_groups": 3}}, ["variants.x.clustering", "'dphubert'"]),
        ({"both": "a=1"}, ["variants.x.both", "'a=1'", "list"]),
    ],
)
def test_bad_variants_are_refused_by_field(variant: Any, said: list) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        check_methods(["x"], {"x": variant})
    with pytest.raises(ValueError, match=says("variants.skill", "method")):
        check_methods(["skill"], {"skill": {}})
