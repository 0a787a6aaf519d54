"""Values that must be equal on every rank, and the error if they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.pruning.agreement import check_agreement, check_ranks, shared_quantities
from skill_fairseq.pruning.expected import expected_parameters
from skill_fairseq.pruning.lagrangian import SizeConstraint


def test_names_and_values(small: Any) -> None:
    encoder = small.random_encoder(pruning_units=["heads", "ffn"])
    constraint = SizeConstraint(0.5)
    constraint.lambda1.data.fill_(-1.5)
    found = shared_quantities(encoder, constraint)
    gates = dict(encoder.named_gates())
    assert list(found) == [*(f"log_alpha of {name}" for name in gates), "lambda1", "lambda2", "expected sparsity"]
    sparsity = 1 - expected_parameters(encoder).item() / encoder.num_parameters()
    assert found["expected sparsity"].tolist() == [pytest.approx(sparsity, abs=1e-7)]
    assert (found["lambda1"].tolist(), found["lambda2"].tolist()) == ([-1.5], [0.0])
    for name, gate in gates.items():
        assert torch.equal(found[f"log_alpha of {name}"], gate.log_alpha.detach().double())
    assert shared_quantities(small.random_encoder()) == {}


@pytest.mark.parametrize("value", [0.2 + 2e-5, float("nan"), -0.2])
def test_the_rank_the_quantity_and_the_values_are_named(value: float) -> None:
    by_rank = torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.5, value]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=says("lambda1", f"{value} on rank 2", "0.2 on rank 0")):
        check_agreement(["expected sparsity", "lambda1"], by_rank)


def test_equal_but_for_rounding_passes() -> None:
    by_rank = torch.tensor([[0.5, 40.0], [0.5 + 9e-6, 40.0 + 3e-4]], dtype=torch.float64)
    check_agreement(["a", "b"], by_rank)
    with pytest.raises(RuntimeError, match="^b: "):
        check_agreement(["a", "b"], by_rank + torch.tensor([[0.0, 0.0], [0.0, 2e-4]]))


def test_one_process_has_nothing_to_compare(small: Any) -> None:
    encoder = small.random_encoder(pruning_units=["ffn"])
    next(iter(encoder.named_gates()))[1].log_alpha.data.fill_(float("nan"))
    check_ranks(encoder, SizeConstraint(0.5))
