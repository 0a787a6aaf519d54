"""Learning rates and objective weights by epoch, against OS-KDFT's first scripts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from messages import says
from omegaconf import OmegaConf
from oracle import RELATED

from skill_fairseq.criterions.terms import Term, read_objective
from skill_fairseq.optim.by_epoch import ByEpoch, epoch_factor

TABLE = RELATED["cases"]["os_kdft"]["schedule_paper_scripts"]["table"]
"""Rows of epoch, rates of speaker head, student and adapters, and distillation weight."""
RAMP = {"ramp_epochs": 10, "decay": 0.93}


def make_scheduler(peak: float, **fields: Any) -> tuple[ByEpoch, Any]:
    adam = {"_name": "adam", "lr": [peak], "tpu": False}
    optimizer = build_optimizer(OmegaConf.create(adam), [torch.nn.Parameter(torch.ones(3))])
    return build_lr_scheduler(OmegaConf.create({"_name": "by_epoch", "lr": [peak], **fields}), optimizer), optimizer


@pytest.mark.parametrize(("column", "peak", "fields"), [(1, 1e-4, {}), (2, 1e-4, RAMP), (3, 1e-3, {})])
def test_rates_of_the_first_scripts(column: int, peak: float, fields: dict) -> None:
    scheduler, optimizer = make_scheduler(peak, **fields)
    assert optimizer.get_lr() == pytest.approx(TABLE[0][column], rel=1e-7)
    for row in TABLE:
        scheduler.step_begin_epoch(row[0])
        assert scheduler.step_update(1000 * row[0]) == optimizer.get_lr() == pytest.approx(row[column], rel=1e-7)
    scheduler.step(100, val_loss=1.0)
    assert optimizer.get_lr() == pytest.approx(TABLE[-1][column], rel=1e-7)


def test_a_cosine_stays_at_its_end() -> None:
    assert epoch_factor(101, 100, 0.01) == epoch_factor(500, 100, 0.01) == pytest.approx(0.01)


def test_weight_of_the_first_scripts() -> None:
    given = OmegaConf.create({"_name": "layers", "weight": 100.0, "weight_epochs": 100})
    _, weight, common, cfg = read_objective(given, "criterion.objectives.distil")
    term = Term(None, weight, cfg, "", "", "", common["weight_epochs"])  # type: ignore[arg-type]
    for row in TABLE:
        assert term.weight_in(row[0]) == pytest.approx(100 * row[4], rel=1e-7, abs=1e-12)
    assert term.weight_in(200) == 0
    assert term._replace(weight_epochs=0).weight_in(7) == 100


def step(optimizer: Any) -> torch.Tensor:
    """The parameter's change in an update whose gradient grows."""
    (parameter,) = optimizer.params
    before = parameter.detach().clone()
    parameter.grad = before.square() + 1
    optimizer.step()
    return parameter.detach() - before


def test_adam_starts_anew_in_each_epoch_but_not_inside_one() -> None:
    """Adam's first step is lr times the gradient's sign, whatever its size."""
    scheduler, optimizer = make_scheduler(0.1, fresh_optimizer=True)
    step(optimizer)
    state = optimizer.optimizer.state
    assert len(state) == 1
    saved = scheduler.state_dict()
    resumed, other = make_scheduler(0.1, fresh_optimizer=True)
    step(other)
    resumed.load_state_dict(saved)
    resumed.step_begin_epoch(1)  # like fairseq when a run resumes inside an epoch
    assert len(other.optimizer.state) == 1
    scheduler.step_begin_epoch(2)
    assert not state
    assert torch.allclose(step(optimizer), torch.full((3,), -optimizer.get_lr()), rtol=1e-5)
    kept, optimizer = make_scheduler(0.1)
    step(optimizer)
    kept.step_begin_epoch(2)
    assert len(optimizer.optimizer.state) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("ramp_epochs", -1), ("final_share", 1.5), ("decay", -0.1), ("decay", 2.0)]
)
def test_bad_values_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=says(field, value, "expected")):
        make_scheduler(0.1, **{field: value})


def test_several_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=says("lr", "[0.1, 0.01]", "one rate")):
        make_scheduler(0.1, lr=[0.1, 0.01])


def test_a_run_that_began_with_another_schedule_goes_on() -> None:
    scheduler, _ = make_scheduler(0.1)
    scheduler.step_begin_epoch(3)
    scheduler.load_state_dict({"best": None})
    assert scheduler.epoch == 3


@pytest.mark.parametrize("value", [-1, 1.5, True, "ten"])
def test_a_bad_number_of_epochs_is_refused(value: Any) -> None:
    given = OmegaConf.create({"_name": "layers", "weight_epochs": value})
    with pytest.raises(ValueError, match=says("criterion.objectives.distil.weight_epochs", value, "expected")):
        read_objective(given, "criterion.objectives.distil")
