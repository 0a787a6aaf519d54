"""The learning-rate schedule in fairseq."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from messages import says
from omegaconf import OmegaConf
from oracle import RELATED

from skill_fairseq.pruning.lagrangian import updates_of

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "lagrangian.json").read_text())["lr_schedule"]


def make_scheduler(warmup: float, total: int, peak: float = 0.002, **more: str):
    adam = {"_name": "adam", "lr": [peak], "tpu": False}
    optimizer = build_optimizer(OmegaConf.create(adam), [torch.nn.Parameter(torch.zeros(3))])
    fields = {"_name": "linear_warmup_decay", "warmup_updates": warmup, "total_num_update": total, "lr": [peak], **more}
    return build_lr_scheduler(OmegaConf.create(fields), optimizer), optimizer


@pytest.mark.parametrize("case", ORACLE)
def test_oracle(case: dict) -> None:
    scheduler, optimizer = make_scheduler(case["warmup"], case["max"])
    returned = scheduler.step_update(case["update_index_0based"])
    assert returned == optimizer.get_lr() == pytest.approx(0.002 * case["factor"], rel=1e-9)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_schedules_of_related_systems(decay: str) -> None:
    """A warm-up over a share of all updates and either decay, against s3prl, which numbers updates from 1."""
    case = RELATED["cases"]["schedule"]
    scheduler, _ = make_scheduler(case["warmup"], case["total"], decay=decay)
    for update, factor in case[decay]:
        assert scheduler.step_update(update - 1) == pytest.approx(0.002 * factor, rel=1e-7, abs=1e-15), update


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=says("sine", "linear", "cosine")):
        make_scheduler(10, 100, decay="sine")


def test_first_update_is_made_at_a_rate_above_zero() -> None:
    _, optimizer = make_scheduler(warmup=10, total=100)
    assert optimizer.get_lr() == pytest.approx(0.002 / 10)


def test_end_of_epoch_and_validation_change_nothing() -> None:
    scheduler, optimizer = make_scheduler(warmup=10, total=100)
    scheduler.step_update(4)
    scheduler.step(epoch=3, val_loss=1.0)
    assert optimizer.get_lr() == pytest.approx(0.002 * 0.5)


@pytest.mark.parametrize(
    ("value", "total", "updates"),
    [(0.3, 50000, 15000), (0.15, 400, 60), (0.1, 5, 1), (0.9, 1, 0), (60, 7, 60), (0, 7, 0)],
)
def test_updates_or_a_fraction_of_them(value: float, total: int, updates: int) -> None:
    assert updates_of(value, total, "some.field") == updates


@pytest.mark.parametrize("value", [-1, -0.5, 1.5, float("nan"), float("inf")])
def test_neither_updates_nor_a_fraction(value: float) -> None:
    with pytest.raises(ValueError, match=says("some.field", value, "whole number", "fraction")):
        updates_of(value, 100, "some.field")
    with pytest.raises(ValueError, match=says("some.field", 0.5, "fraction", "optimization.max_update")):
        updates_of(0.5, 0, "some.field")


def test_a_fraction_is_the_same_schedule() -> None:
    (whole, _), (fraction, _) = make_scheduler(30, 200), make_scheduler(0.15, 200)
    assert [whole.step_update(n) for n in range(200)] == [fraction.step_update(n) for n in range(200)]


@pytest.mark.parametrize(("warmup", "total"), [(100, 100), (15000, 400)])
def test_warmup_must_end_before_training_does(warmup: int, total: int) -> None:
    with pytest.raises(ValueError, match=says("warmup_updates", warmup, total)):
        make_scheduler(warmup, total)
