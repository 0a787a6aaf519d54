from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from skill_fairseq.modules import hard_concrete
from skill_fairseq.modules.hard_concrete import (
    HardConcrete,
    deterministic_gate,
    hard_concrete_sample,
    keep_probability,
    kept_units,
    num_kept,
)

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "gates.json").read_text())
EVAL_CASES = [pytest.param(case, id=case["name"]) for case in ORACLE["eval_cases"]]


def gates(log_alpha: list[float] | torch.Tensor) -> HardConcrete:
    module = HardConcrete(len(log_alpha))
    module.log_alpha.data = torch.as_tensor(log_alpha, dtype=torch.float32)
    return module


def test_constants() -> None:
    const = ORACLE["const"]
    assert hard_concrete.BETA == const["beta"]
    assert (hard_concrete.STRETCH_MIN, hard_concrete.STRETCH_MAX) == (const["limit_l"], const["limit_r"])
    assert (hard_concrete.EPS, hard_concrete.MAGIC) == (const["eps"], const["magic"])
    middle = keep_probability(torch.tensor(-const["bias"], dtype=torch.float64))
    assert middle.item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("case", EVAL_CASES)
def test_expected_number_kept(case: dict) -> None:
    log_alpha = torch.tensor(case["log_alpha"], dtype=torch.float64)
    assert keep_probability(log_alpha).sum().item() == pytest.approx(case["l0_norm_f64"], rel=1e-9)
    assert gates(case["log_alpha"]).expected_kept().item() == pytest.approx(case["l0_norm_f32"], rel=1e-6)


@pytest.mark.parametrize("case", EVAL_CASES)
def test_evaluation(case: dict) -> None:
    log_alpha = torch.tensor(case["log_alpha"])
    module = gates(log_alpha).eval()
    assert num_kept(log_alpha) == case["n_kept"] == len(log_alpha) - case["num_zeros"]
    mask, expected = module(), torch.tensor(case["eval_mask"])
    if "tie" in case["note"]:  # which of equal units goes is not specified
        mask, expected = mask.sort().values, expected.sort().values
    else:
        assert kept_units(log_alpha).nonzero().flatten().tolist() == case["kept_index"]
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=1e-12)


def test_of_equal_units_the_first_stay() -> None:
    assert kept_units(torch.full((12,), 0.0)).tolist() == [True] * 10 + [False] * 2


@pytest.mark.parametrize("case", ORACLE["sample_cases"], ids=lambda case: f"log_alpha={case['log_alpha']}")
def test_samples(case: dict) -> None:
    u = torch.tensor(case["u"])
    z = hard_concrete_sample(torch.full_like(u, case["log_alpha"]), u)
    torch.testing.assert_close(z, torch.tensor(case["z"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5985968, 0.0, 2.0])
def test_keep_probability_is_the_frequency_of_open_gates(log_alpha: float) -> None:
    n = 400_000
    module = gates(torch.full((n,), log_alpha))
    module.generator = torch.Generator().manual_seed(7)
    probability = keep_probability(torch.tensor(log_alpha, dtype=torch.float64)).item()
    frequency = (module() > 0).double().mean().item()
    assert abs(frequency - probability) < 4 * math.sqrt(probability * (1 - probability) / n)


def test_gradients_against_finite_differences() -> None:
    u = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    log_alpha = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: hard_concrete_sample(a, u), log_alpha)
    assert torch.autograd.gradcheck(keep_probability, log_alpha)
    assert torch.autograd.gradcheck(deterministic_gate, log_alpha)


def test_a_closed_gate_stops_all_gradients() -> None:
    module = gates(torch.zeros(2000))
    module.generator = torch.Generator().manual_seed(0)
    weight = torch.ones(2000, requires_grad=True)
    z = module()
    (weight * z).square().sum().backward()
    closed = z == 0
    learning = (z > 0) & (z < 1)
    assert 100 < closed.sum() < 1000 and learning.sum() > 500
    assert not weight.grad[closed].any() and not module.log_alpha.grad[closed].any()
    assert weight.grad[learning].all() and module.log_alpha.grad[learning].all()


@pytest.mark.parametrize("drop_rate", [0.01, 0.5])
def test_start(drop_rate: float) -> None:
    torch.manual_seed(0)
    log_alpha = HardConcrete(10_000, drop_rate, init_std=0.01).log_alpha.detach()
    mean = math.log((1 - drop_rate) / drop_rate)
    assert abs(log_alpha.mean().item() - mean) < 4 * 0.01 / 100
    assert log_alpha.std().item() == pytest.approx(0.01, rel=0.05)


def test_float32_and_optimizer_group_survive_conversion_and_copying() -> None:
    model = nn.Sequential(nn.Linear(3, 5), gates([4.595, 1 / 3, -1.2345678, 0.1, 0.0]))
    before = model[1].log_alpha.detach().clone()
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, copy.deepcopy):
        model = convert(model)
        gate = model[1]
        assert gate.log_alpha.dtype == gate().dtype == torch.float32
        assert torch.equal(gate.log_alpha, before), "rounded on the way"
        assert gate.log_alpha.param_group == "gates"
    assert model[0].weight.dtype == torch.float64
    moved = model.to(device="meta", dtype=torch.float16)[1]
    assert (moved.log_alpha.device.type, moved.log_alpha.dtype) == ("meta", torch.float32)
    assert moved.log_alpha.param_group == "gates"


def test_noise_in_a_half_model_stays_inside_the_open_interval() -> None:
    # In float16 1 - 1e-6 is 1, and its logit infinite: every such gate would be open at any log_alpha.
    module = gates(torch.full((200_000,), -20.0)).half()
    assert not module().any()


def test_override_of_the_kept_units() -> None:
    module = gates([3.0, -3.0, 2.0, 1.0]).eval()
    assert module.kept().tolist() == [True, False, True, True]
    module.set_kept(torch.tensor([True, True, False, False]))
    assert module.kept().tolist() == [True, True, False, False]
    expected = [1 / (1 + math.exp(-0.8 * 1.5 * a)) for a in (3.0, -3.0)] + [0.0, 0.0]
    assert module().tolist() == pytest.approx(expected, rel=1e-6)
    module.set_kept(torch.zeros(4, dtype=torch.bool))
    assert module().tolist() == [0.0] * 4
    module.set_kept(None)
    assert module.kept().tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match=r"torch\.int64 of shape \(4,\).*torch\.bool of shape \(4,\)"):
        module.set_kept(torch.tensor([1, 1, 0, 0]))


@pytest.mark.parametrize("mask", [None, torch.tensor([False, True, False])])
def test_state_loads_strictly_and_takes_effect_at_once(mask: torch.Tensor | None) -> None:
    source = gates([0.5, -4.0, 3.0]).eval()
    source.set_kept(mask)
    target = gates([3.0, 3.0, 3.0]).eval()
    target.set_kept(torch.tensor([True, False, False]))
    assert not torch.equal(target(), source())
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(), source())
    assert torch.equal(target.kept(), source.kept())


def test_generators_of_one_seed_give_the_same_gates() -> None:
    modules = [HardConcrete(50, drop_rate=0.5, init_std=0.0) for _ in range(3)]
    for module, seed in zip(modules, (1, 1, 2)):
        module.generator = torch.Generator().manual_seed(seed)
    first, same, other = (module() for module in modules)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(modules[0](), first), "a fresh sample every time"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), "num_units is 0"),
        ((4, 0.0), "drop_rate is 0.0"),
        ((4, 1.0), "drop_rate is 1.0"),
        ((4, 0.1, -1.0), "init_std is -1.0"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardConcrete(*arguments)
