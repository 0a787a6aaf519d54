from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from messages import says

from skill_fairseq.modules.gate_bank import GateBank
from skill_fairseq.pruning.lagrangian import (
    SizeConstraint,
    ascending,
    lagrangian,
    linear_warmup_decay,
    target_sparsity,
)

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "lagrangian.json").read_text())


@pytest.mark.parametrize("case", ORACLE["values"])
def test_value_and_gradients(case: dict) -> None:
    leaves = [
        torch.tensor(case[name], dtype=torch.float64, requires_grad=True) for name in ("sparsity", "lambda1", "lambda2")
    ]
    value = lagrangian(leaves[0], case["target"], leaves[1], leaves[2])
    value.backward()
    assert value.item() == pytest.approx(case["loss_reg"], rel=1e-9, abs=1e-15)
    gradients = [leaf.grad.item() for leaf in leaves]
    expected = [case[f"d_d{name}"] for name in ("sparsity", "lambda1", "lambda2")]
    assert gradients == pytest.approx(expected, rel=1e-9)


def test_ascending_flips_the_gradient_alone() -> None:
    multiplier = torch.tensor(0.1, requires_grad=True)
    value = ascending(multiplier)
    (3 * value).backward()
    assert value.item() == multiplier.item()
    assert multiplier.grad.item() == -3


@pytest.mark.parametrize("case", ORACLE["target_schedule"])
def test_target_schedule(case: dict) -> None:
    target = target_sparsity(case["global_step"], case["warmup"], case["target"])
    assert target == pytest.approx(case["value"], rel=1e-12)


def test_target_without_warmup_is_final_at_once() -> None:
    assert target_sparsity(0, 0, 0.75) == 0.75


@pytest.mark.parametrize("case", ORACLE["lr_schedule"])
def test_learning_rate_schedule(case: dict) -> None:
    factor = linear_warmup_decay(case["update_index_0based"], case["warmup"], case["max"])
    assert factor == pytest.approx(case["factor"], rel=1e-9)


def test_trajectory() -> None:
    """Thirty updates of gates and multipliers with one descending AdamW, as in training."""
    setting = ORACLE["trajectory"]
    gate = GateBank().add(setting["n_gates"])
    gate.log_alpha.data.copy_(torch.tensor(setting["loga0"], dtype=torch.float64))
    constraint = SizeConstraint(setting["target"], setting["sparsity_warmup"])
    parameters = [gate.bank.log_alpha, *constraint.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.double()  # like the oracle: multipliers pass close to zero
    optimizer = torch.optim.AdamW(
        parameters, lr=setting["reg_lr"], weight_decay=0.0, betas=tuple(setting["adamw"]["betas"])
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: linear_warmup_decay(update, setting["lr_warmup"], setting["lr_max"])
    )
    expected = {row["step"]: row for row in setting["after_step"]}
    for update in range(30):
        rate = schedule.get_last_lr()[0]
        current = 1 - gate.expected_kept() / setting["n_gates"]
        loss = constraint(current, update)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, setting["clip"])
        optimizer.step()
        schedule.step()
        if update in expected:
            row = expected.pop(update)
            found = [rate, constraint.target_at(update), current.item(), loss.item()]
            found += [constraint.lambda1.item(), constraint.lambda2.item(), *gate.log_alpha.tolist()]
            wanted = [row["lr_loga"], row["target"], row["sparsity"], row["loss"]]
            wanted += [row["lambda1"], row["lambda2"], *row["log_alpha"]]
            assert found == pytest.approx(wanted, rel=1e-5), f"update {update}"
    assert not expected


def test_constraint_reaches_its_target() -> None:
    torch.manual_seed(0)
    gate = GateBank().add(200)
    constraint = SizeConstraint(target=0.75, warmup=100)
    optimizer = torch.optim.AdamW([gate.bank.log_alpha, *constraint.parameters()], lr=0.05, weight_decay=0.0)
    for update in range(1500):
        current = 1 - gate.expected_kept() / 200
        optimizer.zero_grad()
        constraint(current, update).backward()
        optimizer.step()
    assert current.item() == pytest.approx(0.75, abs=0.01)


def test_multipliers_stay_float32_in_their_own_group() -> None:
    constraint = SizeConstraint(0.75)
    constraint.lambda1.data.fill_(1 / 3)
    for converted in (constraint.half(), copy.deepcopy(constraint)):
        for parameter in converted.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.param_group == "multipliers"
        assert torch.equal(converted.lambda1, torch.tensor(1 / 3))
    assert sorted(constraint.state_dict()) == ["lambda1", "lambda2"]


@pytest.mark.parametrize("target", [-0.1, 1.0, 75])
def test_impossible_target(target: float) -> None:
    with pytest.raises(ValueError, match=says("target_sparsity", target, "[0, 1)")):
        SizeConstraint(target)
