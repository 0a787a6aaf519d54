"""An augmented Lagrangian constraint on the student's cost, and the learning-rate factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skill_fairseq.pruning.targets import Constraint, least_excess, target_sparsity  # noqa: F401


def lagrangian(sparsity: Tensor, target: float, lambda1: float | Tensor, lambda2: float | Tensor) -> Tensor:
    """``lambda1 (s - t) + lambda2 (s - t)^2``, a scalar (DPHuBERT, arXiv:2305.17651; Wang et al. 2020)."""
    excess = sparsity - target
    return lambda1 * excess + lambda2 * excess**2


def ascending(multiplier: Tensor) -> Tensor:
    """Identity with a negated gradient, so that a descending optimizer ascends."""
    return 2 * multiplier.detach() - multiplier


def linear_warmup_decay(update: int, warmup: int, max_update: int, decay: str = "linear") -> float:
    """Factor on every learning rate: rises to 1 over ``warmup`` updates, falls to 0 at the last update.

    ``update`` is the index of the next update, from 0; the first factor is ``1 / warmup``. The fall is linear, or with
    ``decay`` "cosine" half a cosine period.
    """
    step = update + 1
    if step <= warmup:
        return step / warmup
    left = max(0, max_update - step) / max(1, max_update - warmup)
    return (1 - math.cos(math.pi * left)) / 2 if decay == "cosine" else left


def updates_of(value: float, total: int, field: str) -> int:
    """Converts a config's value, a number of updates or a fraction of all, to updates.

    Args:
        value: a whole number of at least 0, or a fraction above 0 and below 1.
        total: updates of the run, only used for fractions.
        field: where the value comes from, for messages.

    Raises:
        ValueError: it is neither, or a fraction without a total.
    """
    if 0 < value < 1:
        if total <= 0:
            raise ValueError(f"{field}: {value} is a fraction of optimization.max_update, which is {total}; set it")
        return min(max(1, round(value * total)), total - 1)
    if not 0 <= value < math.inf or value != int(value):
        raise ValueError(
            f"{field}: {value}; expected a whole number of updates, or a fraction of the run between 0 and 1"
        )
    return int(value)


class CostConstraint(Constraint):
    """Holds the multipliers and computes the regulariser that drives the student to its target sparsity.

    The student minimises the regulariser while ``lambda1`` and ``lambda2`` maximise it: they are parameters (scalars,
    float32 at any precision, initially zero, optimizer group ``multipliers``) with a negated gradient, so that an
    ordinary optimizer can train them. They must have no weight decay.

    Arguments are those of :class:`Constraint`.
    """

    param_group = "multipliers"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lambda1 = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.lambda2 = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, sparsity: Tensor | Sequence[Tensor], update: int) -> Tensor:
        """Regulariser at an update, a float32 scalar.

        Args:
            sparsity: the expected sparsity, a float32 scalar, or one per target.
            update: index of the update, from 0.
        """
        sparsities = [sparsity] if isinstance(sparsity, Tensor) else sparsity
        excess = least_excess(sparsities, self.targets_at(update))
        return lagrangian(excess, 0.0, ascending(self.lambda1), ascending(self.lambda2))


class SizeConstraint(CostConstraint):
    """The constraint on the number of parameters."""

    def __init__(self, target: float, warmup: int = 5000, schedule: str = "linear") -> None:
        super().__init__(target, warmup, schedule=schedule)
