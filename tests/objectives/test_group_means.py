"""SKILL's objective alone: its projections, and the settings that a later run must share."""

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


WIDER = TEACHER.replace(encoder_embed_dim=48, encoder_attention_heads=4, encoder_layers=6)
TWO = [[0, "1/0"], [1, 3, "1/2", "1/5", "1/6"], ["1/1"], [2]]


@pytest.mark.parametrize("sharing", ["none", "all", [0, 1, 1, 0]])
def test_groups_of_two_teachers_of_two_widths(sharing: Any) -> None:
    """Loss and gradients by definition: the group's loss is the mean over its teachers, each with a projection."""
    cfg = GroupMeansConfig(groups=TWO, group_weights=[0.5, 1.0, 2.0, 0.25], projection_sharing=sharing)
    skill = GroupMeans(cfg, TEACHER, [TEACHER, WIDER]).double()
    asked = [(tap.teacher, tap.layers) for tap in skill.teacher_taps]
    assert asked == [(0, (0,)), (1, (0,)), (0, (1, 3)), (1, (2, 5, 6)), (1, (1,)), (0, (2,))]
    assert [tap.layers for tap in skill.student_taps] == [(0,), (1, 3), (1,), (2,)]
    torch.manual_seed(0)
    for parameter in skill.parameters():
        torch.nn.init.normal_(parameter)
    student = [state.requires_grad_() for state in means(4)]
    teacher = [means(1, (32, 48)[k], seed)[0] for seed, (k, _) in enumerate(asked)]
    loss, logged = skill(student, teacher)
    given = torch.autograd.grad(loss, [*student, *skill.parameters()])

    indices = {"none": [0, 1, 2, 3], "all": [0, 0, 0, 0]}.get(str(sharing), sharing)
    pairs = {(k, indices[g]) for g, k in zip((0, 0, 1, 1, 2, 3), (0, 1, 0, 1, 1, 0))}
    of = {pair: i for i, pair in enumerate(sorted(pairs))}
    assert [p.out_features for p in skill.projections] == [(32, 48)[k] for k, _ in of]

    def term(g: int, k: int, target: Tensor) -> Tensor:
        each = skill.projections[of[k, indices[g]]]
        found = student[g] @ each.weight.T + each.bias
        cos = (found * target).sum(-1) / found.norm(dim=-1) / target.norm(dim=-1)
        return (found - target).abs().mean() - cos.mean()

    t = teacher
    brute = [(term(0, 0, t[0]) + term(0, 1, t[1])) / 2, (term(1, 0, t[2]) + term(1, 1, t[3])) / 2]
    brute += [term(2, 1, t[4]), term(3, 0, t[5])]
    expected = sum(weight * part for weight, part in zip((0.5, 1.0, 2.0, 0.25), brute))
    wanted = torch.autograd.grad(expected, [*student, *skill.parameters()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(given, wanted):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14) and mine.any()
    for g, part in enumerate(brute):
        assert (logged[f"l1_g{g}"] - logged[f"cos_g{g}"]).item() == pytest.approx(part.item(), rel=1e-12)


def test_settings_of_two_teachers() -> None:
    skill = GroupMeans(GroupMeansConfig(groups=TWO), TEACHER, [TEACHER, WIDER])
    assert skill.settings({"groups": [["1/10", 3, "1/2"], ["0/1"]]}) == {"groups": [[3, "1/2", "1/10"], [1]]}


def test_settings_are_the_same_however_they_are_written() -> None:
    skill = objective()
    one = {"groups": [[1, 3], [0]], "projection_sharing": "all", "normalize_states": None, "l1_weight": 2.0}
    two = {"groups": [[3, 1], [0]], "projection_sharing": [0, 0]}
    assert skill.settings(one) == skill.settings(two) == {"groups": [[1, 3], [0]], "projection_sharing": [0, 0]}
    assert skill.settings({}) == {}


def test_layers_of_a_student_of_another_depth() -> None:
    student = EncoderConfig(**{**SHAPE, "encoder_layers": 2})
    skill = objective(student, groups=[[2], [3]], student_groups=[[2], [1, 2]])
    assert [tap.layers for tap in skill.student_taps] == [(2,), (1, 2)]
    assert objective(student, groups=[[2], [3]]).student_groups == ((1,), (2,))
    assert skill.settings({"student_groups": [[2], [1, 2]]}) == {"student_groups": [[2], [1, 2]]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([[2]], ["criterion.student_groups is [[2]]", "criterion.groups has 2"]),
        (2, ["criterion.student_groups is 2"]),
        ([[1], [3]], ["criterion.student_groups names layer 3", "layers 0..2"]),
        ([[1], []], ["criterion.student_groups has the group []"]),
    ],
)
def test_layers_that_the_student_does_not_have(given: Any, said: list[str]) -> None:
    student = EncoderConfig(**{**SHAPE, "encoder_layers": 2})
    with pytest.raises(ValueError, match=says(*said)):
        objective(student, groups=[[2], [3]], student_groups=given)
