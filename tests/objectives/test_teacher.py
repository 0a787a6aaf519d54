"""The frozen teacher: what it runs, its precision, and its results."""

from __future__ import annotations

import pytest
import torch
from messages import says

from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.teacher import FrozenTeacher
from tests.conftest import LARGE_STYLE, random_encoder

TAPS = [Tap((0, 2)), Tap((1,))]


def source() -> torch.Tensor:
    return torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("style", [{}, LARGE_STYLE])
def test_means_of_the_hidden_states(style: dict) -> None:
    states = random_encoder(**style)(source()).hidden_states
    pair, alone = FrozenTeacher(random_encoder(**style)).tap(source(), None, TAPS)
    torch.testing.assert_close(pair, (states[0] + states[2]) / 2)
    torch.testing.assert_close(alone, states[1])


def test_what_it_hands_over_enters_a_graph() -> None:
    teacher = FrozenTeacher(random_encoder())
    mean, _ = teacher.tap(source(), None, TAPS)
    weight = torch.ones(32, requires_grad=True)
    (mean * weight).sum().backward()
    torch.testing.assert_close(weight.grad, mean.sum((0, 1)))
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())


OLD = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch < 2 has no GELU in float16 on CPUs")


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.05), pytest.param("fp16", 0.006, marks=OLD)])
def test_own_precision(dtype: str, tolerance: float) -> None:
    taps = [*TAPS, Tap((2,), "mean_map")]
    wanted = FrozenTeacher(random_encoder()).tap(source(), None, taps)
    teacher = FrozenTeacher(random_encoder(), dtype)
    found = teacher.tap(source(), None, taps)
    assert all(p.dtype == teacher.dtype for p in teacher.encoder.parameters())
    for mean, exact in zip(found, wanted):
        assert mean.dtype == torch.float32
        error = (mean - exact).norm() / exact.norm()
        assert 1e-5 < error < tolerance


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match=says("fp8", "fp32", "bf16", "fp16")):
        FrozenTeacher(random_encoder(), "fp8")


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(torch.nn.Module, "compile"), reason="torch < 2.2 has no Module.compile")
def test_compiled_layers_give_the_same() -> None:
    taps = [*TAPS, Tap((1, 2), "mean_map")]
    wanted = FrozenTeacher(random_encoder()).tap(source(), None, taps)
    found = FrozenTeacher(random_encoder(), compile=True).tap(source(), None, taps)
    for mean, exact in zip(found, wanted):
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5)
