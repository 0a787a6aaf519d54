from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from skill_fairseq.modules import hard_concrete
from skill_fairseq.modules.gate_bank import GateBank, HardConcrete
from skill_fairseq.modules.hard_concrete import (
    deterministic_gate,
    hard_concrete_sample,
    keep_probability,
    kept_units,
    num_kept,
)

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "gates.json").read_text())
EVAL_CASES = [pytest.param(case, id=case["name"]) for case in ORACLE["eval_cases"]]


def gates(log_alpha: list[float] | torch.Tensor) -> HardConcrete:
    gate = GateBank().add(len(log_alpha))
    gate.log_alpha.data.copy_(torch.as_tensor(log_alpha, dtype=torch.float32))
    return gate


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
    module = gates(log_alpha)
    module.bank.eval()
    assert num_kept(log_alpha) == case["n_kept"] == len(log_alpha) - case["num_zeros"]
    mask, expected = module(), torch.tensor(case["eval_mask"])
    if "tie" in case["note"]:  # which of equal units is dropped is not specified
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
    module.bank.generator = torch.Generator().manual_seed(7)
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
    module.bank.generator = torch.Generator().manual_seed(0)
    weight = torch.ones(2000, requires_grad=True)
    z = module()
    (weight * z).square().sum().backward()
    closed = z == 0
    learning = (z > 0) & (z < 1)
    assert 100 < closed.sum() < 1000 and learning.sum() > 500
    assert not weight.grad[closed].any() and not module.grad[closed].any()
    assert weight.grad[learning].all() and module.grad[learning].all()
