from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from messages import says
from torch import Tensor

from skill_fairseq.objectives.loss import distillation_loss

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "loss.json").read_text())


def oracle_tensor(key: str) -> Tensor:
    return torch.tensor(ORACLE[key]).view(ORACLE["dims"])


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("case", [case for case in ORACLE["cases"] if not case["l2_weight"]])
def test_oracle(case: dict) -> None:
    weights = {key: case[key] for key in ("l1_weight", "cos_weight", "cos_type")}
    loss = distillation_loss(oracle_tensor("student"), oracle_tensor("target"), **weights)
    found = [loss.total.item(), loss.l1.item(), loss.cos.item()]
    assert found == pytest.approx([case["loss"], case["l1"], case["cos"]], rel=1e-5)


def test_oracle_gradient() -> None:
    student = oracle_tensor("student").requires_grad_()
    distillation_loss(student, oracle_tensor("target")).total.backward()
    torch.testing.assert_close(student.grad, oracle_tensor("grad_student_L1_cos_raw"), rtol=1e-5, atol=1e-8)


def test_defaults_are_dphubert() -> None:
    student, teacher = pair(2, 5, 4)
    loss = distillation_loss(student, teacher)
    l1, cosines = 0.0, 0.0
    for s, t in zip(student.view(-1, 4).tolist(), teacher.view(-1, 4).tolist()):
        l1 += sum(abs(a - b) for a, b in zip(s, t)) / 40
        cosines += sum(a * b for a, b in zip(s, t)) / (math.hypot(*s) * math.hypot(*t)) / 10
    assert loss.l1.item() == pytest.approx(l1, rel=1e-12)
    assert loss.cos.item() == pytest.approx(-cosines, rel=1e-12)
    assert loss.total.item() == pytest.approx(l1 - cosines, rel=1e-12)


@pytest.mark.parametrize("cos_type", ["raw", "log_sig"])
def test_gradient_against_finite_differences(cos_type: str) -> None:
    student, teacher = pair(2, 3, 4)
    mask = torch.tensor([[False, False, True], [False, True, True]])

    def total(student: Tensor) -> Tensor:
        return distillation_loss(student, teacher, mask, 0.7, 1.3, cos_type).total

    assert torch.autograd.gradcheck(total, student.requires_grad_())


def test_padding_does_not_count() -> None:
    student, teacher = pair(2, 6, 4)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    student[1, 4:] = math.nan
    teacher[1, 4:] = 1e30
    student.requires_grad_()
    loss = distillation_loss(student, teacher, mask)
    # The means weight every frame equally: 6 of the first utterance, 4 of the second.
    alone = [distillation_loss(student[i : i + 1, :n], teacher[i : i + 1, :n]) for i, n in enumerate((6, 4))]
    for part, first, second in zip(loss, *alone):
        assert part.item() == pytest.approx((6 * first.item() + 4 * second.item()) / 10, rel=1e-12)
    loss.total.backward()
    first, second = student.grad
    assert first.all() and second[:4].all() and not second[4:].any()


def test_mask_without_padding_changes_nothing() -> None:
    student, teacher = pair(2, 6, 4)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    for masked, plain in zip(distillation_loss(student, teacher, mask), distillation_loss(student, teacher)):
        torch.testing.assert_close(masked, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = pair(2, 5, 4, dtype=dtype)
    student, teacher = 1000 * student, -1000 * teacher  # squares overflow float16
    loss = distillation_loss(student, teacher)
    exact = distillation_loss(student.double(), teacher.double())
    assert loss.total.dtype == torch.float32
    assert [part.item() for part in loss] == pytest.approx([part.item() for part in exact], rel=1e-5)


@pytest.mark.parametrize(
    "shapes, mask, options, said",
    [
        (((1, 5, 4), (1, 5, 6)), None, {}, ["student", "(1, 5, 4)", "teacher", "(1, 5, 6)"]),
        (((1, 5, 4), (1, 4, 4)), None, {}, ["student", "(1, 5, 4)", "teacher", "(1, 4, 4)"]),
        (((1, 5, 4),) * 2, torch.zeros(1, 9, dtype=torch.bool), {}, ["padding_mask", "(1, 9)"]),
        (((1, 5, 4),) * 2, torch.ones(1, 5, dtype=torch.bool), {}, ["padding_mask", "every"]),
        (((1, 5, 4),) * 2, None, {"cos_type": "sig"}, ["cos_type", "'sig'", "raw", "log_sig"]),
    ],
)
def test_bad_arguments(shapes: tuple, mask: Tensor | None, options: dict, said: list) -> None:
    student, teacher = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=says(*said)):
        distillation_loss(student, teacher, mask, **options)
