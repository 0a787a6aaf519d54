"""Costs in constraint, selection and report, and a new one that only this file registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.size import Number, Widths, widths_of
from skill_fairseq.pruning.costs import COSTS, PARAMETERS, Cost, MacCost, make_cost, register_cost, saved_cost
from skill_fairseq.pruning.expected import expected_sparsity, expected_widths
from skill_fairseq.pruning.lagrangian import CostConstraint
from skill_fairseq.pruning.reach import sparsity_report, travel_to
from skill_fairseq.pruning.selection import apply_selection, check_reachable, select_units, selected_cost
from skill_fairseq.pruning.shrink import shrink
from tests.pruning.test_shrink import BASE, LARGE, assert_same_outputs, gated_encoder


@dataclasses.dataclass(frozen=True)
class PeakMemory(Cost):
    """The largest number of activations in a layer, smoothed to have a gradient everywhere: a float."""

    name = "peak_memory"
    sharpness: float = 8.0

    def __call__(self, config: EncoderConfig, widths: Widths) -> Number:
        shares = [torch.as_tensor(width) / config.encoder_ffn_embed_dim for width in widths["ffn"]]
        peak = torch.logsumexp(self.sharpness * torch.stack(shares).double(), 0) / self.sharpness
        return peak if peak.requires_grad else peak.item()

    def __str__(self) -> str:
        return "of peak memory"


@pytest.fixture
def peak_memory() -> Any:
    yield register_cost(PeakMemory)()
    del COSTS[PeakMemory.name]


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("sparsity", [0.4, 0.7])
def test_shrinking_to_macs_hits_them(shape: dict, sparsity: float) -> None:
    gated = gated_encoder(shape, ("conv", "heads", "ffn"), spread=1.0)
    cost = MacCost(2.0)
    small = shrink(gated, sparsity, cost)
    found, before = small.macs(2.0), gated.macs(2.0)
    smallest_unit = 2 * 99 * 32  # of the FFN, on 99 frames
    assert abs(found - (1 - sparsity) * before) <= smallest_unit / 2 + 1
    assert found == selected_cost(gated, sparsity, cost) == cost(small.config, widths_of(small.config))
    assert shrink(gated, sparsity).macs(2.0) != found  # the same saving in parameters gives another selection
    apply_selection(gated, select_units(gated, sparsity, cost))
    assert_same_outputs(gated, small, padded=False)


def test_a_step_against_the_constraint_on_macs_lowers_them() -> None:
    gated = gated_encoder(BASE, ("conv", "heads", "ffn"))
    constraint = CostConstraint(0.9, 0, MacCost(1.0))
    optimizer = torch.optim.Adam([gated.gates.log_alpha, *constraint.parameters()], lr=0.1)
    found = []
    for update in range(30):
        sparsity = constraint.cost.sparsity(gated.config, expected_widths(gated))
        optimizer.zero_grad()
        constraint(sparsity, update).backward()
        optimizer.step()
        found.append(sparsity.item())
    assert found[-1] > found[0] + 0.1 and constraint.lambda1 < 0
    assert found[0] == pytest.approx(
        expected_sparsity(gated_encoder(BASE, ("conv", "heads", "ffn")), cost=MacCost(1.0))
    )


def test_reports_and_reach_are_of_the_cost() -> None:
    gated = gated_encoder(BASE, ("conv", "heads", "ffn"), spread=0.1)
    cost = MacCost(1.0)
    moved = travel_to(gated, 0.8, cost)
    assert expected_sparsity(gated, -moved, cost) == pytest.approx(0.8, abs=1e-3)
    assert expected_sparsity(gated, -moved) != pytest.approx(0.8, abs=1e-2)
    shrunk = cost.sparsity(gated.config, widths_of(shrink(gated, 0.8, cost).config))
    says_so = sparsity_report(gated, 0.8, cost)
    assert f"{gated.macs(1.0):,} MACs for 1 s" in says_so and f"{shrunk:.4f} by skill-shrink" in says_so
    with pytest.raises(ValueError, match=says("criterion.target_sparsity", 0.999, "MACs for 1 s")):
        check_reachable(gated.config, 0.999, "criterion.target_sparsity", cost)


def test_a_cost_of_ones_own(peak_memory: Any) -> None:
    """It works in constraint, selection and report without other changes, although it is a float and not a sum over
    units."""
    cost = make_cost("peak_memory", cost_sharpness=8.0, cost_seconds=10.0)
    assert cost == peak_memory == saved_cost({"cost": "peak_memory", "cost_sharpness": 8.0, "groups": [[0]]})
    gated = gated_encoder(BASE, ("heads", "ffn"), spread=0.5)
    gated.gates.log_alpha.data.add_(1.0)
    sparsity = cost.sparsity(gated.config, expected_widths(gated))
    CostConstraint(0.5, 0, cost)(sparsity, 0).backward()
    assert all(gate.grad.abs().max() == 0 for name, gate in gated.named_gates() if "attention" in name)
    small = shrink(gated, 0.5, cost)
    assert max(small.config.ffn_dims) < 48 and cost.sparsity(small.config, widths_of(small.config)) == pytest.approx(
        0.5, abs=0.02
    )
    assert "of peak memory" in sparsity_report(gated, 0.5, cost)


def test_names_and_settings() -> None:
    assert make_cost() == make_cost("parameters", cost_seconds=3.0) == saved_cost({}) == PARAMETERS
    assert make_cost("macs", cost_seconds=None) == MacCost(10.0)
    assert make_cost(**MacCost(3.0).settings()) == MacCost(3.0)
    with pytest.raises(ValueError, match=says("cost", "'flops'", "parameters", "macs")):
        make_cost("flops")
    for seconds in (0, -1.0, float("nan"), "ten"):
        with pytest.raises(ValueError, match=says("cost_seconds", seconds)):
            make_cost("macs", cost_seconds=seconds)
