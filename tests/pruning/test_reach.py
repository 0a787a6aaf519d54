"""Warnings before stage 1 that the gates cannot reach the target, and the report after it."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from messages import says
from omegaconf import OmegaConf
from runs import logged, train

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.expected import expected_parameters, expected_sparsity
from skill_fairseq.pruning.lagrangian import SizeConstraint, linear_warmup_decay
from skill_fairseq.pruning.reach import (
    arrival_warning,
    check_reach,
    far_from_gates,
    gate_schedule,
    log_sparsity,
    reach_warnings,
    schedule_factors,
    sparsity_report,
    travel_to,
    warmup_warnings,
)
from skill_fairseq.pruning.selection import selected_cost
from skill_fairseq.pruning.shrink import shrink

UNITS = ["conv", "heads", "ffn"]


@pytest.fixture
def gated(small: Any) -> SpeechEncoder:
    """All gates at 4.6."""
    encoder = small.random_encoder(pruning_units=UNITS)
    for _, gate in encoder.named_gates():
        gate.log_alpha.data.fill_(4.6)
    return encoder


def config(max_update: int = 100, warmup: int = 10, **gates: Any) -> Any:
    scheduler = {"_name": "linear_warmup_decay", "warmup_updates": warmup, "total_num_update": max_update}
    return OmegaConf.create(
        {
            "optimization": {"max_update": max_update, "lr": [0.001]},
            "optimizer": {
                "_name": "composite",
                "groups": {"default": {"lr_float": 0.001}, "gates": {"lr_scheduler": scheduler, **gates}},
            },
            "lr_scheduler": {"_name": "pass_through"},
        }
    )


def criterion(target: float = 0.5, warmup: int = 30) -> Any:
    return SimpleNamespace(constraint=SizeConstraint(target, warmup))


@pytest.mark.parametrize(("warmup", "total", "updates"), [(10, 100, 100), (0, 50, 50), (10, 100, 40), (10, 100, 130)])
def test_factors_of_our_schedule_are_the_sum_of_the_optimizers_rates(warmup: int, total: int, updates: int) -> None:
    from skill_fairseq.optim.linear_warmup_decay import LinearWarmupDecay

    scheduler = OmegaConf.create(
        {"_name": "linear_warmup_decay", "warmup_updates": warmup, "total_num_update": total, "lr": [0.5]}
    )
    optimizer = SimpleNamespace(lr=None)
    optimizer.set_lr = lambda lr: setattr(optimizer, "lr", lr)
    optimizer.get_lr = lambda: optimizer.lr
    # fairseq's base class needs its own optimizer; the schedule is ours.
    schedule = LinearWarmupDecay.__new__(LinearWarmupDecay)
    schedule.cfg, schedule.optimizer, schedule.warmup = scheduler, optimizer, warmup
    rates = [schedule.step_update(update) for update in range(updates)]
    assert schedule_factors(scheduler, updates) * 0.5 == pytest.approx(sum(rates), rel=1e-12)
    if updates == total and warmup:
        assert schedule_factors(scheduler, updates) == pytest.approx(total / 2)


def test_other_schedulers_are_bounded_by_their_peak() -> None:
    assert schedule_factors({"_name": "cosine", "warmup_updates": 10}, 70) == 70
    assert schedule_factors(None, 70) == 70
    assert all(linear_warmup_decay(u, 10, 70) <= 1 for u in range(70))


def test_where_the_gates_rate_stands() -> None:
    found = gate_schedule(config(lr_float=0.2))
    assert found is not None and found.field == "optimizer.groups.gates.lr_float"
    assert (found.peak, found.travel) == (0.2, pytest.approx(0.2 * 50))
    found = gate_schedule(config(lr_float=None, lr=[0.3]))
    assert found is not None and (found.field, found.peak) == ("optimizer.groups.gates.lr", 0.3)
    one = OmegaConf.create(
        {
            "optimization": {"max_update": 40, "lr": [0.01]},
            "optimizer": {"_name": "adam"},
            "lr_scheduler": {"_name": "linear_warmup_decay", "warmup_updates": 4, "total_num_update": 40},
        }
    )
    found = gate_schedule(one)
    assert found is not None and (found.field, found.peak) == ("optimization.lr", 0.01)
    assert found.factors == pytest.approx(20)
    assert gate_schedule(config(max_update=0, lr_float=0.2)) is None


def test_travel_is_what_brings_the_gates_there(gated: SpeechEncoder) -> None:
    full = gated.num_parameters()
    for target in (0.1, 0.5, 0.75):
        travel = travel_to(gated, target)
        for _, gate in gated.named_gates():
            gate.log_alpha.data -= travel
        assert 1 - expected_parameters(gated).item() / full == pytest.approx(target, abs=1e-3)
        assert travel_to(gated, target - 0.002) == 0 and expected_sparsity(gated) == pytest.approx(target, abs=1e-3)
        for _, gate in gated.named_gates():
            gate.log_alpha.data += travel
    assert expected_sparsity(gated, -3.0) > expected_sparsity(gated, -2.0) > expected_sparsity(gated)
    assert travel_to(gated, 0.999) == math.inf
    assert all((gate.log_alpha == 4.6).all() for _, gate in gated.named_gates())


def test_a_run_that_is_too_short_is_told_what_would_do(gated: SpeechEncoder, caplog: Any) -> None:
    cfg = config(max_update=20, warmup=2, lr_float=0.1)
    with caplog.at_level(logging.WARNING):
        (message,) = check_reach(cfg, gated, criterion(0.5, 6))
    assert [record.getMessage() for record in caplog.records] == [message]
    assert re.search(says("criterion.target_sparsity", 0.5, "cannot"), message)
    assert "optimizer.groups.gates.lr_float=0.1" in message and "optimization.max_update=20" in message
    assert f"{expected_sparsity(gated, -1.0):.4f}" in message  # 0.1 x 20 / 2
    rate = float(re.search(r"optimizer\.groups\.gates\.lr_float to (\S+)", message)[1])
    updates = int(re.search(r"optimization\.max_update to (\d+)", message)[1])
    # Either remedy silences it, but hardly anything less.
    for changes, less in (((20, rate), (20, 0.9 * rate)), ((updates, 0.1), (int(0.9 * updates), 0.1))):
        warnings = [
            check_reach(config(max_update=n, warmup=2, lr_float=lr), gated, criterion(0.5, 6))
            for n, lr in (changes, less)
        ]
        assert not warnings[0] and len(warnings[1]) == 1 and "cannot" not in warnings[1][0]


def test_gates_that_are_there_already_need_no_travel(gated: SpeechEncoder) -> None:
    for _, gate in gated.named_gates():
        gate.log_alpha.data.fill_(-3.0)
    schedule = gate_schedule(config(lr_float=1e-9))
    assert schedule is not None and reach_warnings(gated, schedule, 100, 0.5) == []


def test_a_rate_of_zero(gated: SpeechEncoder) -> None:
    schedule = gate_schedule(config(lr_float=0.0))
    assert schedule is not None
    (message,) = reach_warnings(gated, schedule, 100, 0.5)
    assert re.search(says("cannot", "optimizer.groups.gates.lr_float"), message) and "max_update to" not in message


@pytest.mark.parametrize(
    ("warmup", "said"),
    [
        (90, None),
        (0, None),
        (91, ("9 updates", 0.6)),
        (100, ("0 updates", 0.6)),
        (150, ("0.4000", 0.6)),
    ],
)
def test_warmup_of_the_target(warmup: int, said: tuple | None) -> None:
    found = warmup_warnings(warmup, 100, 0.6)
    assert len(found) == (said is not None)
    for message in found:
        asked = (f"criterion.sparsity_warmup: {warmup}", "optimization.max_update=100")
        assert re.search(says(*asked, *said, "criterion.sparsity_warmup to 90"), message)


def test_no_constraint_nothing_to_warn_of(gated: SpeechEncoder) -> None:
    assert check_reach(config(max_update=1, lr_float=0.0), gated, SimpleNamespace(constraint=None)) == []
    assert check_reach(config(max_update=0, lr_float=0.0), gated, criterion()) == []


def test_report_says_what_shrinking_then_gives(gated: SpeechEncoder) -> None:
    generator = torch.Generator().manual_seed(0)
    for _, gate in gated.named_gates():
        gate.log_alpha.data.copy_(torch.randn(gate.num_units, generator=generator) * 2)
    full = gated.num_parameters()
    numbers = [float(n) for n in re.findall(r"0\.\d{4}", sparsity_report(gated, 0.62))]
    rounded, shrunk = (1 - shrink(gated, s).num_parameters() / full for s in (None, 0.62))
    assert numbers == [pytest.approx(n, abs=6e-5) for n in (expected_sparsity(gated), rounded, shrunk, 0.62)]
    assert f"of {full:,} parameters" in sparsity_report(gated, 0.62)
    assert selected_cost(gated, 0.62) == shrink(gated, 0.62).num_parameters()


def test_warning_at_the_end_of_stage_1(gated: SpeechEncoder, caplog: Any) -> None:
    assert arrival_warning(0.74, 0.75) is None and arrival_warning(0.765, 0.75) is None
    short, beyond = arrival_warning(0.6, 0.75), arrival_warning(0.8, 0.75)
    assert short and beyond
    assert re.search(says("0.1500", "short", "criterion.target_sparsity=0.75", "--sparsity 0.600"), short)
    assert re.search(says("raise", "optimizer.groups.gates.lr_float"), short)
    assert re.search(says("0.0500", "beyond", "lower", "optimizer.groups.multipliers.lr_float"), beyond)
    with caplog.at_level(logging.INFO):
        log_sparsity(gated, 0.5)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_sparsity(gated, round(expected_sparsity(gated), 2))
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_far_from_what_the_gates_expect(gated: SpeechEncoder) -> None:
    travel = travel_to(gated, 0.5)
    for _, gate in gated.named_gates():
        gate.log_alpha.data -= travel
    expected = expected_sparsity(gated)
    assert far_from_gates(gated, expected + 0.049, "a") is None and far_from_gates(gated, expected - 0.049, "a") is None
    for asked in (0.4, 0.6):
        message = far_from_gates(gated, asked, "--sparsity")
        found = (f"--sparsity: {asked}", "0.10", f"{expected:.4f}")
        assert message and re.search(says(*found, "0.45", "0.55", f"criterion.target_sparsity={asked}"), message)


@pytest.mark.faults(
    "the run is too short, or the gates too slow, for the target sparsity",
    "a warning before training names the fields and sufficient values; a report at the end",
)
@pytest.mark.slow
def test_a_real_run_that_is_too_short_is_warned_and_does_not_get_there(
    speech: Path, teacher_file: Path, tmp_path: Path
) -> None:
    log = train(
        tmp_path,
        "distill",
        f"task.data={speech}",
        f"task.teacher={teacher_file}",
        "common.log_format=json",
        "common.log_interval=1",
        "dataset.max_tokens=60000",
        "criterion.groups=[[0],[3]]",
        "criterion.target_sparsity=0.5",
        "criterion.sparsity_warmup=0",
        "optimization.max_update=12",
        *(f"optimizer.groups.{group}.lr_scheduler.warmup_updates=2" for group in ("default", "gates", "multipliers")),
        "optimizer.groups.gates.lr_float=0.8",
        "optimizer.groups.multipliers.lr_float=5",
    )
    found = re.search(r"\[WARNING\] - criterion\.target_sparsity: 0\.5 cannot (.*)", log)
    assert found and re.search(says("optimizer.groups.gates.lr_float=0.8", "optimization.max_update=12"), found[1])
    best = float(re.search(r"would give (0\.\d+)", found[1])[1])
    reached = logged(log, "train_inner")[-1]["expected_sparsity"]
    assert 0.02 < reached < best < 0.3  # from 0.003 at the start
    ended = re.search(r"sparsity of [\d,]+ parameters: (0\.\d+) expected by the gates, .* the target is 0\.5000", log)
    assert ended and float(ended[1]) == pytest.approx(reached, abs=0.1)  # logged before the last update
    assert re.search(r"\[WARNING\] - .*short of criterion\.target_sparsity=0\.5\b", log)
