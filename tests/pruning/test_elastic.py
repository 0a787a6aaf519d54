"""Several sizes in one update: shifts, gradients, random sizes, and refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import PARAMETERS, Cost, MacCost
from skill_fairseq.pruning.elastic import ElasticConstraint, Sizes, read_sizes
from skill_fairseq.pruning.expected import expected_widths
from tests.pruning.test_shrink import BASE, gated_encoder

UNITS = ("conv", "heads", "ffn")


def expected(encoder: SpeechEncoder, log_alpha: torch.Tensor, cost: Cost = PARAMETERS) -> float:
    """The expected remaining share for these gates, in float64."""
    moved = (log_alpha - encoder.gates.log_alpha).detach().double()
    return float(1 - cost.sparsity(encoder.config, expected_widths(encoder, moved)))


@pytest.mark.parametrize("cost", [PARAMETERS, MacCost(2.0)], ids=str)
def test_gates_expect_each_size_and_a_smaller_ones_units_are_among_a_larger_ones(cost: Cost) -> None:
    gated = gated_encoder(BASE, UNITS).train()
    constraint = ElasticConstraint(Sizes(0.35, 0.7), cost=cost)
    constraint.impose(gated, 0)
    assert constraint.log_alpha(gated, 0.7, 0) is None
    assert expected(gated, gated.gates.log_alpha, cost) == pytest.approx(0.7, abs=2e-6)
    drawn = []
    gated.gates.generator = torch.Generator()
    for size in (0.7, 0.5, 0.35):
        values = constraint.log_alpha(gated, size, 0)
        if values is not None:
            assert expected(gated, values, cost) == pytest.approx(size, abs=2e-6)
        gated.gates.generator.manual_seed(4)  # like the student's model
        drawn.append(gated.draw_gates(values).z)
    assert all((smaller <= larger).all() for larger, smaller in zip(drawn, drawn[1:]))
    assert [int((z > 0).sum()) for z in drawn] == sorted((int((z > 0).sum()) for z in drawn), reverse=True)
    assert (drawn[0] > 0).sum() > (drawn[2] > 0).sum()


def test_sizes_rise_over_the_warmup_together() -> None:
    gated = gated_encoder(BASE, UNITS)
    gated.gates.log_alpha.data.copy_(4.6 + 0.01 * torch.randn_like(gated.gates.log_alpha))
    constraint = ElasticConstraint(Sizes(0.35, 0.7), warmup=10)
    for update, wanted in ((5, 1 - 0.65 / 2), (10, 0.35), (30, 0.35)):
        constraint.impose(gated, update)
        assert expected(gated, constraint.log_alpha(gated, 0.35, update)) == pytest.approx(wanted, abs=2e-6)


def test_the_gradient_is_that_of_the_shifted_loss() -> None:
    """Against central differences of ``a -> loss(a + c(a))`` for the smaller size, with gates fixed at the larger."""
    gated = gated_encoder(BASE, UNITS, spread=1.0)
    constraint = ElasticConstraint(Sizes(0.35, 0.7))
    for _ in range(2):
        constraint.impose(gated, 0)
    gates = gated.gates.log_alpha
    weights = torch.randn(len(gates), generator=torch.Generator().manual_seed(1)).double()

    def loss(size: float) -> Any:
        return (torch.sigmoid(constraint.log_alpha(gated, size, 0).double()) * weights).sum()

    loss(0.4).backward()
    found, at = gates.grad.clone(), gates.detach().clone()
    assert abs(float(found.sum())) < 1e-4 * float(found.abs().sum())
    largest = found.abs().max()
    for i in (0, len(gates) // 3, len(gates) // 2, len(gates) - 1):
        values = []
        for step in (0.05, -0.05):
            with torch.no_grad():
                gates.copy_(at)
                gates[i] += step
                values.append(float(loss(0.4)))
        with torch.no_grad():
            gates.copy_(at)
        assert (values[0] - values[1]) / 0.1 == pytest.approx(float(found[i]), abs=5e-3 * float(largest)), i


def test_sizes_are_drawn_by_seed_and_update_alone() -> None:
    constraint = ElasticConstraint(Sizes(0.1, 0.5, between=2))
    drawn = [constraint.sizes_at(update, 1) for update in range(200)]
    assert drawn == [copy.deepcopy(constraint).sizes_at(update, 1) for update in range(200)]
    assert all(sizes[:2] == [0.5, 0.1] and len(sizes) == 4 for sizes in drawn)
    between = [size for sizes in drawn for size in sizes[2:]]
    assert len(set(between)) == 400 and all(0.1 <= size <= 0.5 for size in between)
    assert sum(between) / 400 == pytest.approx(0.3, abs=0.02)
    assert drawn[0] != constraint.sizes_at(0, 2)
    assert pickle.loads(pickle.dumps(constraint)).sizes == constraint.sizes
    assert ElasticConstraint(Sizes(0.1, 0.5, between=0)).sizes_at(3, 1) == [0.5, 0.1]


def test_sizes_of_a_config() -> None:
    assert read_sizes({"smallest": 0.1, "largest": 0.5}, "f") == Sizes(0.1, 0.5, 1, (0.1, 0.3, 0.5))
    assert read_sizes({"smallest": 0.1, "largest": 0.5, "between": 2, "valid": [0.25]}, "f").valid == (0.25,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0.5, ("f", 0.5, "expected", "smallest")),
        ({"smallest": 0.1}, ("f", "largest")),
        ({"smallest": 0.1, "largest": 0.5, "most": 3}, ("f", "most", "expected")),
        ({"smallest": 0, "largest": 0.5}, ("f.smallest", 0, "above 0")),
        ({"smallest": 0.1, "largest": 1.0}, ("f.largest", 1.0, "below 1")),
        ({"smallest": 0.1, "largest": float("nan")}, ("f.largest", "nan")),
        ({"smallest": 0.1, "largest": "half"}, ("f.largest", "half")),
        ({"smallest": 0.5, "largest": 0.5}, ("f.smallest", 0.5, "less than largest")),
        ({"smallest": 0.1, "largest": 0.5, "between": -1}, ("f.between", -1)),
        ({"smallest": 0.1, "largest": 0.5, "between": 1.5}, ("f.between", 1.5)),
        ({"smallest": 0.1, "largest": 0.5, "valid": [0.6]}, ("f.valid", 0.6, 0.1, 0.5)),
        ({"smallest": 0.1, "largest": 0.5, "valid": 0.2}, ("f.valid", 0.2, "list")),
    ],
)
def test_sizes_that_are_refused(given: Any, said: tuple) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        read_sizes(given, "f")
