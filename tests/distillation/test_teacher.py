"""The frozen teacher: what it runs, in which precision, and what it hands over."""

from __future__ import annotations

import weakref

import pytest
import torch
from messages import says

from skill_fairseq.distillation.groups import group_means
from skill_fairseq.distillation.teacher import FrozenTeacher, averaged_states
from tests.conftest import LARGE_STYLE, random_encoder

GROUPS = [[0, 2], [1]]


def source() -> torch.Tensor:
    return torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("style", [{}, LARGE_STYLE])
def test_means_of_the_hidden_states(style: dict) -> None:
    states = random_encoder(**style)(source()).hidden_states
    means, mask = FrozenTeacher(random_encoder(**style)).group_means(source(), None, GROUPS)
    for found, wanted in zip(means, group_means(states, GROUPS)):
        torch.testing.assert_close(found, wanted)
    assert mask is None


def test_no_layer_beyond_the_deepest_group_runs() -> None:
    teacher = FrozenTeacher(random_encoder())
    ran: list[int] = []
    for i, layer in enumerate(teacher.encoder.transformer.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    teacher.group_means(source(), None, GROUPS)
    assert ran == [0, 1]


def test_states_are_not_kept() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def states():
        nonlocal most
        for i in range(20):
            state = torch.full((1, 4, 2), float(i))
            alive.append(weakref.ref(state))
            yield state
            del state
            most = max(most, sum(ref() is not None for ref in alive))

    (mean,) = averaged_states(states(), [list(range(20))])
    assert torch.equal(mean, torch.full((1, 4, 2), 9.5))
    assert most <= 2


def test_means_enter_a_graph() -> None:
    teacher = FrozenTeacher(random_encoder())
    means, _ = teacher.group_means(source(), None, GROUPS)
    weight = torch.ones(32, requires_grad=True)
    (means[0] * weight).sum().backward()
    torch.testing.assert_close(weight.grad, means[0].sum((0, 1)))
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())


OLD = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch < 2 has no GELU in float16 on CPUs")


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.05), pytest.param("fp16", 0.006, marks=OLD)])
def test_own_precision(dtype: str, tolerance: float) -> None:
    wanted, _ = FrozenTeacher(random_encoder()).group_means(source(), None, GROUPS)
    teacher = FrozenTeacher(random_encoder(), dtype)
    found, _ = teacher.group_means(source(), None, GROUPS)
    assert all(p.dtype == teacher.dtype for p in teacher.encoder.parameters())
    for mean, exact in zip(found, wanted):
        assert mean.dtype == torch.float32
        error = (mean - exact).norm() / exact.norm()
        assert 1e-5 < error < tolerance


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match=says("fp8", "fp32", "bf16", "fp16")):
        FrozenTeacher(random_encoder(), "fp8")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.nn.Module, "compile"), reason="torch < 2.2 has no Module.compile")
def test_compiled_layers_give_the_same() -> None:
    wanted, _ = FrozenTeacher(random_encoder()).group_means(source(), None, GROUPS)
    found, _ = FrozenTeacher(random_encoder(), compile=True).group_means(source(), None, GROUPS)
    for mean, exact in zip(found, wanted):
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5)
