"""SKILL's objective by itself: its projections, and what a run that goes on must have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.objectives.group_means import GroupMeans, GroupMeansConfig, projection
from skill_fairseq.objectives.loss import distillation_loss
from tests.conftest import SHAPE

TEACHER = EncoderConfig(**SHAPE)
DPHUBERT = [[0], [1], [2], [3]]


def objective(student: EncoderConfig = TEACHER, **fields: Any) -> GroupMeans:
    return GroupMeans(GroupMeansConfig(**{"groups": DPHUBERT, **fields}), student, [TEACHER]).double()


def means(number: int, width: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, width, generator=generator, dtype=torch.float64) for _ in range(number)]


@pytest.mark.parametrize("kind", ["linear", "identity"])
def test_projections_start_as_the_identity(kind: str) -> None:
    skill = objective(projection=kind, projection_sharing="none")
    (state,) = means(1)
    assert all(torch.equal(each(state), state) for each in skill.projections)
    assert sum(p.numel() for p in skill.parameters()) == (4 * (32 * 32 + 32) if kind == "linear" else 0)


def test_dphubert_shares_one_projection_between_three_layers() -> None:
    skill = objective(projection_sharing=[0, 1, 1, 1], cos_weight=0.0)
    assert set(skill.state_dict()) == {f"projections.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")}
    torch.nn.init.zeros_(skill.projections[1].weight)
    student, teacher = means(4), means(4, seed=1)
    loss, logged = skill(student, teacher)
    assert logged["l1_g0"].item() == pytest.approx((student[0] - teacher[0]).abs().mean().item())
    rest = [target.abs().mean().item() for target in teacher[1:]]
    assert [logged[f"l1_g{i}"].item() for i in (1, 2, 3)] == pytest.approx(rest)
    assert loss.item() == pytest.approx((logged["l1_g0"].item() + sum(rest)) / 4)


@pytest.mark.parametrize("student, teacher", [(4, 6), (6, 4)])
def test_projection_to_another_width_starts_by_passing(student: int, teacher: int) -> None:
    (state,) = means(1, student)
    projected = projection("linear", student, teacher).double()(state)
    assert projected.shape == (2, 3, teacher)
    assert torch.equal(projected[..., :4], state[..., :4])
    assert not projected[..., 4:].any()


def test_bad_projections() -> None:
    with pytest.raises(ValueError, match=says(4, 6, "a.projection=linear")):
        projection("identity", 4, 6, "a.projection")
    with pytest.raises(ValueError, match=says("a.projection", "'conv'", "'linear'")):
        projection("conv", 4, 4, "a.projection")


def test_padding_does_not_count() -> None:
    skill = objective(projection_sharing="none")
    student, teacher = means(4), means(4, seed=1)
    mask = torch.tensor([[False, False, True], [False, True, True]])
    for state in student:
        state[mask] = float("nan")
    loss, logged = skill(student, teacher, mask)
    parts = [distillation_loss(s[~mask], t[~mask]) for s, t in zip(student, teacher)]
    assert loss.item() == pytest.approx(sum(part.total.item() for part in parts) / 4)
    assert logged["cos_g2"].item() == pytest.approx(-parts[2].cos.item())


def test_what_it_asks_and_chooses() -> None:
    cfg = GroupMeansConfig(groups=[[0], [3, 1]])
    skill = GroupMeans(cfg, TEACHER.replace(encoder_layers=6), [TEACHER.replace(layer_norm_first=True)])
    assert [tap.layers for tap in skill.teacher_taps] == [(0,), (3, 1)]
    assert [tap.layers for tap in skill.student_taps] == [(0,), (6, 2)]
    assert all(tap.normalize and tap.kind == "states" for tap in (*skill.student_taps, *skill.teacher_taps))
    assert cfg.normalize_states is True


def test_settings_are_the_same_however_they_are_written() -> None:
    skill = objective()
    one = {"groups": [[1, 3], [0]], "projection_sharing": "all", "normalize_states": None, "l1_weight": 2.0}
    two = {"groups": [[3, 1], [0]], "projection_sharing": [0, 0]}
    assert skill.settings(one) == skill.settings(two) == {"groups": [[1, 3], [0]], "projection_sharing": [0, 0]}
    assert skill.settings({}) == {}
