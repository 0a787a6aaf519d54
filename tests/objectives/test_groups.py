from __future__ import annotations

from typing import Any

import pytest
import yaml
from messages import says
from omegaconf import OmegaConf

from skill_fairseq.objectives.groups import by_teacher, layer_name, layer_of, map_groups, parse_groups, parse_sharing

DPHUBERT = ((0,), (4,), (8,), (12,))


@pytest.mark.parametrize("convert", [list, tuple, OmegaConf.create])
def test_parse_groups(convert: Any) -> None:
    groups = parse_groups(convert([[0], [3, 1, 2], [12]]), depths=[12])
    assert groups == ((0,), (3, 1, 2), (12,))
    assert all(type(layer) is int for group in groups for layer in group)


@pytest.mark.parametrize(
    "value, said",
    [
        ([], ["[]"]),
        (None, [None]),
        ("[[0],[4]]", ["'[[0],[4]]'", "list"]),
        ([[0], []], ["group []"]),
        ([0, 4], ["group 0"]),
        ([[0], ["4"]], ["layer '4'", "integer"]),
        ([[0], [1.0]], ["layer 1.0"]),
        ([[True]], ["layer True"]),
        ([[0], [13]], ["layer 13"]),
        ([[-1]], ["layer -1"]),
        ([[0, 4], [4, 8]], ["layer 4", "twice", "[[0, 4], [4, 8]]"]),
        ([[3, 3]], ["layer 3", "twice"]),
    ],
)
def test_bad_groups_name_field_value_and_remedy(value: Any, said: list) -> None:
    for given in (value, OmegaConf.create(value)) if isinstance(value, list) else (value,):
        with pytest.raises(ValueError, match=says("criterion.groups", *said, "layers 0..12")):
            parse_groups(given, depths=[12])


def test_layers_of_several_teachers() -> None:
    read = yaml.safe_load("[[0, 1/0], [2, '1/6', 3], [0/1, 2/10]]")
    groups = parse_groups(OmegaConf.create(read), [3, 6, 10])
    assert groups == ((0, "1/0"), (2, "1/6", 3), (1, "2/10"))
    assert by_teacher(groups[1]) == {0: (2, 3), 1: (6,)} and by_teacher(groups[2]) == {0: (1,), 2: (10,)}
    for pair in ((0, 7), (1, 0), (2, 24)):
        assert layer_of(layer_name(*pair)) == pair
    # Each in proportion to its teacher's depth; layers that map to the same student layer count once.
    assert map_groups(((0, "1/0"), (2, "1/4"), (3, "1/3")), [3, 6], 6) == ((0,), (4,), (6, 3))


@pytest.mark.parametrize(
    "layer, said",
    [
        ("1/7", ["layer 1/7", "does not exist"]),
        ("2/1", ["layer 2/1", "2 teacher"]),
        (yaml.safe_load("1:4"), ["layer 64", "does not exist"]),  # of YAML 1.1
        ("1:4", ["'1:4'", "1/4"]),
        ("-1/2", ["'-1/2'"]),
        ("1/2/3", ["'1/2/3'"]),
        ("1/٢", ["'1/"]),
        ("0/2", ["0/2", "twice"]),
        (None, ["None"]),
    ],
)
def test_bad_layers_of_several_teachers(layer: Any, said: list) -> None:
    with pytest.raises(ValueError, match=says("criterion.groups", *said, "0..3", "1/0..1/6")):
        parse_groups([[2], [layer]], [3, 6])


def test_groups_of_another_depth() -> None:
    assert map_groups(DPHUBERT, [12], 6) == ((0,), (2,), (4,), (6,))
    assert map_groups(((0,), (1, 2, 3), (11, 12)), [12], 24) == ((0,), (2, 4, 6), (22, 24))
    assert map_groups(((0, 1, 2), (3, 4, 5, 6), (12,)), [12], 2) == ((0, 1), (1,), (2,))


@pytest.mark.parametrize("student_layers", [1, 2, 5, 12, 24])
def test_mapping_is_monotone_and_keeps_both_ends(student_layers: int) -> None:
    ((*mapped,),) = map_groups((tuple(range(13)),), [12], student_layers)
    assert mapped == sorted(mapped)
    assert (mapped[0], mapped[-1]) == (0, student_layers)
    single = [map_groups(((layer,),), [12], student_layers)[0][0] for layer in range(13)]
    assert 0 not in single[1:]
    assert student_layers != 12 or single == list(range(13))


@pytest.mark.parametrize(
    "value, indices",
    [
        (None, (0, 1, 2, 3)),
        ("none", (0, 1, 2, 3)),
        ("all", (0, 0, 0, 0)),
        ([0, 1, 1, 1], (0, 1, 1, 1)),
        (OmegaConf.create([1, 0, 0, 2]), (1, 0, 0, 2)),
    ],
)
def test_sharing(value: Any, indices: tuple) -> None:
    assert parse_sharing(value, 4) == indices


@pytest.mark.parametrize("value", [[0, 1], [0, 2, 2, 2], [1, 1, 1, 1], [0, -1, 1, 2], [0, 1.0, 1, 1], "some", 3, []])
def test_bad_sharing(value: Any) -> None:
    with pytest.raises(ValueError, match=says("criterion.projection_sharing", str(value), "'none'", "'all'", 4)):
        parse_sharing(value, 4)
