"""The exact constraint: its shift against a root finder, its gradient against differences, and real runs."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import says
from runs import logged, train
from scipy.optimize import brentq

from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.checkpoints.source import build_encoder
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import GateBank
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning import ExactConstraint, Gates, gate
from skill_fairseq.pruning.costs import PARAMETERS, Cost, MacCost
from skill_fairseq.pruning.exact import solve_shift
from skill_fairseq.pruning.expected import expected_widths, starting_widths
from skill_fairseq.pruning.shrink import shrink
from skill_fairseq.pruning.targets import SCHEDULES, target_sparsity
from tests.pruning.test_shrink import BASE, LARGE, gated_encoder

UNITS = ("conv", "heads", "ffn")
RUN = (
    "criterion.constraint=exact",
    "criterion.groups=[[0],[1,2],[3]]",
    "criterion.target_sparsity=0.5",
    "criterion.sparsity_warmup=3",
    "+criterion.sparsity_schedule=cosine",
    "optimizer.groups.default.lr_scheduler.total_num_update=6",
    "optimizer.groups.gates.lr_scheduler.total_num_update=6",
    "dataset.max_tokens=60000",
    "common.log_interval=1",
    "common.log_format=json",
)


def sparsity(encoder: SpeechEncoder, cost: Cost = PARAMETERS) -> float:
    """In float64."""
    widths = expected_widths(encoder, torch.zeros((), dtype=torch.float64))
    return float(cost.sparsity(encoder.config, widths).detach())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_rise_from_nothing_to_the_target(schedule: str) -> None:
    values = [target_sparsity(update, 40, 0.9, schedule) for update in range(60)]
    assert values[0] == 0 and values[40:] == [0.9] * 20
    assert all(a < b for a, b in zip(values[:40], values[1:41]))
    assert values[10] == pytest.approx(
        {"linear": 0.225, "cosine": 0.45 * (1 - math.cos(math.pi / 4)), "exponential": 1 - 0.1**0.25}[schedule]
    )
    left = [1 - value for value in values]
    if schedule == "exponential":
        assert [b / a for a, b in zip(left[:40], left[1:41])] == pytest.approx([0.1 ** (1 / 40)] * 40)


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("cost", [PARAMETERS, MacCost(2.0)], ids=str)
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_shift_is_that_of_a_root_finder(shape: dict, cost: Cost, target: float) -> None:
    gated = gated_encoder(shape, (*UNITS, "ffn_layers"), spread=4.0)
    before = gated.gates.log_alpha.detach().double().numpy().copy()

    def excess(shift: float) -> float:
        widths = expected_widths(gated, torch.tensor(shift, dtype=torch.float64))
        return float(cost.sparsity(gated.config, widths).detach()) - target

    wanted = brentq(excess, -60, 60, xtol=1e-13)
    ExactConstraint(target, 0, cost).impose(gated, 0)
    moved = gated.gates.log_alpha.detach().double().numpy() - before
    assert np.abs(moved - wanted).max() < 3e-6
    assert sparsity(gated, cost) == pytest.approx(target, abs=2e-7)


def test_far_off_gates_are_brought_there_at_once() -> None:
    gated = gated_encoder(BASE, UNITS, spread=0.1)
    for start in (-80.0, 80.0):
        gated.gates.log_alpha.data += start
        ExactConstraint(0.6, 0).impose(gated, 0)
        assert sparsity(gated) == pytest.approx(0.6, abs=1e-6)


def test_between_two_ends_that_do_not_bracket_the_nearer_one_is_taken() -> None:
    low, high = torch.tensor(-1.0).double(), torch.tensor(2.0).double()
    for zero, wanted in ((0.3, 0.3), (5.0, 2.0), (-5.0, -1.0)):
        assert float(solve_shift(lambda shift: (zero - shift) ** 3, low, high)) == pytest.approx(wanted, abs=2e-5)  # noqa: B023


def test_gates_that_are_there_stay_bit_for_bit() -> None:
    gated = gated_encoder(BASE, UNITS, spread=2.0)
    constraint = ExactConstraint(0.75, 0)
    constraint.impose(gated, 0)
    there = gated.gates.log_alpha.detach().clone()
    for _ in range(3):
        copy.deepcopy(constraint).impose(gated, 0)
    assert torch.equal(gated.gates.log_alpha, there)


def test_gates_are_not_opened_beyond_their_start() -> None:
    torch.manual_seed(0)
    gates = gate(SpeechEncoder(gated_encoder(BASE, ()).config), UNITS, drop_rate=0.2)
    started = sparsity(gates.encoder)
    found = []
    constraint = ExactConstraint(0.75, 10)
    for update in range(12):
        constraint.impose(gates, update)
        found.append(sparsity(gates.encoder))
    assert found[0] == pytest.approx(started, abs=2e-3) and 0.01 < started < 0.075
    assert found[1:] == pytest.approx([max(0.075 * u, found[0]) for u in range(1, 10)] + [0.75] * 2, abs=1e-6)
    ExactConstraint(0.02, 10).impose(gates, 0)  # below the start: applies immediately
    assert sparsity(gates.encoder) == pytest.approx(0.02, abs=1e-6)


def test_the_gradient_is_that_of_the_shifted_loss() -> None:
    """Against central differences of ``a -> loss(a + c(a))``."""
    gated = gated_encoder(BASE, UNITS, spread=1.0)
    constraint = ExactConstraint(0.6, 0)
    for _ in range(2):
        constraint.impose(gated, 0)
    gates = gated.gates.log_alpha
    weights = torch.randn(len(gates), generator=torch.Generator().manual_seed(1)).double()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return (weights * torch.sigmoid(values.double() / 3)).sum()

    (2 * loss(gates)).backward()  # linear in the loss, as for accumulated batches
    loss(gates).backward()
    found, there = gates.grad / 3, gates.detach().clone()
    for i in torch.randperm(len(gates), generator=torch.Generator().manual_seed(2))[:12].tolist():
        ends = []
        for step in (0.05, -0.05):
            gates.data.copy_(there)
            gates.data[i] += step
            ExactConstraint(0.6, 0).impose(gated, 0)
            ends.append(loss(gates.detach()).item())
        assert found[i].item() == pytest.approx((ends[0] - ends[1]) / 0.1, rel=2e-2, abs=2e-4)
    assert abs(found.sum().item()) < 1e-4  # a common shift changes nothing


def test_training_keeps_the_target_in_every_update_and_tells_units_apart() -> None:
    """Gates of units that the loss needs open and the others close; a loss that needs all equally moves none."""
    torch.manual_seed(0)
    gates = gate(SpeechEncoder(gated_encoder(BASE, ()).config), ["ffn"])
    bank = gates.encoder.gates
    wanted = torch.arange(len(bank.log_alpha)) % 2 == 0
    started = float(PARAMETERS.sparsity(gates.encoder.config, starting_widths(gates.encoder)))
    constraint = ExactConstraint(0.1, 20)
    optimizer = torch.optim.Adam([bank.log_alpha], lr=0.1)
    for update in range(120):
        constraint.impose(gates, update)
        assert abs(sparsity(gates.encoder) - max(target_sparsity(update, 20, 0.1), started)) < 2e-6
        loss = -torch.sigmoid(bank.log_alpha)[wanted].sum() + constraint(gates.expected_sparsity(), update)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    constraint.impose(gates, 120)
    assert bank.log_alpha[wanted].min() > bank.log_alpha[~wanted].max() + 5
    small = shrink(gates.encoder.eval(), 0.1)
    assert PARAMETERS.sparsity(small.config, widths_of(small.config)) == pytest.approx(0.1, abs=0.003)


def test_it_has_no_state_and_copies_are_of_their_own() -> None:
    gated = gated_encoder(BASE, UNITS, spread=1.0)
    constraint = ExactConstraint(0.6, 0)
    constraint.impose(gated, 0)
    assert not list(constraint.parameters()) and not constraint.state_dict()
    pair = copy.deepcopy((gated, constraint))
    ExactConstraint(0.3, 0).impose(pair[0], 0)
    assert sparsity(gated) == pytest.approx(0.6, abs=1e-6) != sparsity(pair[0])
    pickle.loads(pickle.dumps(constraint)).impose(pair[0], 0)
    assert sparsity(pair[0]) == pytest.approx(0.6, abs=1e-6)
    assert isinstance(pair[0].gates, GateBank) and isinstance(Gates(gated), Gates)


@pytest.mark.parametrize(
    ("fields", "said"), [({"schedule": "steps"}, ["schedule", "'steps'", "cosine"]), ({"warmup": -1}, ["warmup", -1])]
)
def test_what_is_refused(fields: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        ExactConstraint(0.5, **fields)
    with pytest.raises(ValueError, match=says("target")):
        ExactConstraint([])
    gated = gated_encoder(BASE, ("ffn",))
    with pytest.raises(ValueError, match=says("target", 0.5, "cannot be reached", "ffn")):
        ExactConstraint(0.5).impose(gated, 0)


def weights(folder: Path) -> dict[str, Any]:
    checkpoint = load_torch_file(folder / "checkpoint_last.pt")
    return {**checkpoint["model"], **checkpoint["criterion"]}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_runs_are_exact_and_resume_bit_for_bit(
    speech: Path, teacher_file: Path, tmp_path: Path, precision: str
) -> None:
    if precision == "bf16" and not hasattr(torch, "get_autocast_dtype"):
        pytest.skip("torch < 2.4 lacks half-precision kernels for the CPU")
    common = (*RUN, f"task.data={speech}", f"task.teacher={teacher_file}")
    common += (f"common.bf16={str(precision == 'bf16').lower()}",)
    once = logged(train(tmp_path / "once", "distill", *common, "optimization.max_update=5"), "train_inner")
    found = [entry["expected_sparsity"] for entry in once]
    assert found[1:] == pytest.approx([entry["target_sparsity"] for entry in once[1:]], abs=1.1e-4)
    assert found[1:] == pytest.approx([0.125, 0.375, 0.5, 0.5], abs=1e-4) and 0.001 < found[0] < 0.01
    assert not any("lambda1" in entry for entry in once)
    for updates in (2, 5):
        log = train(tmp_path / "twice", "distill", *common, f"optimization.max_update={updates}")
    assert "multipliers" not in "".join(line for line in log.splitlines() if "chang" in line)
    assert "0.5000 expected by the gates" in log
    found, wanted = weights(tmp_path / "twice"), weights(tmp_path / "once")
    assert found.keys() == wanted.keys() and not any("lambda" in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    source = read_source(tmp_path / "once" / "checkpoint_last.pt")
    gated = build_encoder(source, tmp_path)
    assert sparsity(gated) == pytest.approx(0.5, abs=2e-6)  # in its saved state there is no later update to shift for
    small = shrink(gated.eval(), source.provenance["target_sparsity"])
    assert PARAMETERS.sparsity(small.config, widths_of(small.config)) == pytest.approx(0.5, abs=1e-3)
