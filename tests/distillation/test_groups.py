from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says
from omegaconf import OmegaConf
from torch import Tensor

from skill_fairseq.distillation.groups import (
    GroupMeanAccumulator,
    GroupProjections,
    group_means,
    map_groups,
    parse_groups,
    parse_sharing,
)

DPHUBERT = ((0,), (4,), (8,), (12,))


def states(layers: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(layers + 1)]


@pytest.mark.parametrize("convert", [list, tuple, OmegaConf.create])
def test_parse_groups(convert: Any) -> None:
    groups = parse_groups(convert([[0], [3, 1, 2], [12]]), num_layers=12)
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
            parse_groups(given, num_layers=12)


def test_groups_of_another_depth() -> None:
    assert map_groups(DPHUBERT, 12, 6) == ((0,), (2,), (4,), (6,))
    assert map_groups(((0,), (1, 2, 3), (11, 12)), 12, 24) == ((0,), (2, 4, 6), (22, 24))
    assert map_groups(((0, 1, 2), (3, 4, 5, 6), (12,)), 12, 2) == ((0, 1), (1,), (2,))


@pytest.mark.parametrize("student_layers", [1, 2, 5, 12, 24])
def test_mapping_is_monotone_and_keeps_both_ends(student_layers: int) -> None:
    ((*mapped,),) = map_groups((tuple(range(13)),), 12, student_layers)
    assert mapped == sorted(mapped)
    assert (mapped[0], mapped[-1]) == (0, student_layers)
    single = [map_groups(((layer,),), 12, student_layers)[0][0] for layer in range(13)]
    assert 0 not in single[1:]
    assert student_layers != 12 or single == list(range(13))


def test_group_means() -> None:
    hidden = states(4, 2, 3, 5)
    first, second, third = group_means(hidden, ((0,), (4, 1, 2), (3,)))
    assert first is hidden[0] and third is hidden[3]
    torch.testing.assert_close(second, (hidden[1] + hidden[2] + hidden[4]) / 3)


def test_group_means_leave_the_states_and_pass_gradients() -> None:
    hidden = [state.requires_grad_() for state in states(3, 1, 2, 2)]
    before = [state.detach().clone() for state in hidden]
    (mean,) = group_means(hidden, ((1, 3),))
    mean.sum().backward()
    assert all(torch.equal(state, copy) for state, copy in zip(hidden, before))
    assert hidden[0].grad is None and hidden[2].grad is None
    for layer in (1, 3):
        assert torch.equal(hidden[layer].grad, torch.full_like(hidden[layer], 0.5))


def test_means_of_float16_do_not_overflow() -> None:
    hidden = [torch.full((1, 1, 2), 60000.0, dtype=torch.float16)] * 4
    (mean,) = group_means(hidden, ((0, 1, 2, 3),))
    assert mean.dtype == torch.float16
    assert mean.tolist() == [[[60000.0, 60000.0]]]


def test_streaming_in_any_order_equals_the_means_at_once() -> None:
    hidden, groups = states(4, 2, 3, 5), ((0, 1), (1, 2), (4,))  # as after mapping, groups may share a layer
    accumulator = GroupMeanAccumulator(groups)
    for layer in (3, 1, 0, 4, 2):
        accumulator.add(layer, hidden[layer])
    for found, wanted in zip(accumulator.means(), group_means(hidden, groups)):
        torch.testing.assert_close(found, wanted)


def test_streaming_misuse() -> None:
    accumulator = GroupMeanAccumulator(((0,), (1, 2)))
    accumulator.add(1, torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match=says("layer 1")):
        accumulator.add(1, torch.zeros(1, 1, 1))
    accumulator.add(0, torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match=says("layers [2]", "group [1, 2]")):
        accumulator.means()


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


@pytest.mark.parametrize("kind", ["linear", "identity"])
def test_projections_start_as_the_identity(kind: str) -> None:
    projections = GroupProjections(DPHUBERT, 6, 6, kind).double()
    means = states(3, 2, 3, 6)
    for projected, mean in zip(projections(means), means):
        assert torch.equal(projected, mean)
    assert sum(p.numel() for p in projections.parameters()) == (4 * (36 + 6) if kind == "linear" else 0)


def test_dphubert_shares_one_projection_between_three_layers() -> None:
    projections = GroupProjections(DPHUBERT, 6, 6, sharing=[0, 1, 1, 1]).double()
    assert sum(p.numel() for p in projections.parameters()) == 2 * (36 + 6)
    torch.nn.init.zeros_(projections.projections[1].weight)
    means = states(3, 1, 2, 6)
    projected = projections(means)
    assert torch.equal(projected[0], means[0])
    assert not torch.stack(projected[1:]).any()


@pytest.mark.parametrize("dim_student, dim_teacher", [(4, 6), (6, 4)])
def test_projection_to_another_dimension_starts_by_passing(dim_student: int, dim_teacher: int) -> None:
    projections = GroupProjections([(0,)], dim_student, dim_teacher).double()
    (mean,) = states(0, 2, 3, dim_student)
    (projected,) = projections([mean])
    assert projected.shape == (2, 3, dim_teacher)
    assert torch.equal(projected[..., :4], mean[..., :4])
    assert not projected[..., 4:].any()


def test_bad_projections() -> None:
    with pytest.raises(ValueError, match=says(4, 6, "criterion.projection=linear")):
        GroupProjections([(0,)], 4, 6, "identity")
    with pytest.raises(ValueError, match=says("criterion.projection", "'conv'", "'linear'")):
        GroupProjections([(0,)], 4, 4, "conv")
    with pytest.raises(ValueError, match=says("2 means", "1 groups")):
        GroupProjections([(0,)], 4, 4)(states(1, 1, 1, 4))
