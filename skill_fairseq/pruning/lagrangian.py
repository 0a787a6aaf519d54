"""The constraint on the student's cost: an augmented Lagrangian, its target, and the learning-rate factor.

Costs enter as sparsity, ``s = 1 - E[cost] / original cost``, see :mod:`skill_fairseq.pruning.costs`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from skill_fairseq.modules.fp32 import Float32Module
from skill_fairseq.pruning.costs import PARAMETERS, Cost


def target_sparsity(update: int, warmup: int, final: float) -> float:
    """Target at an update (the first is 0): rises linearly from 0 to ``final`` over ``warmup`` updates."""
    return final if update >= warmup else final * update / warmup


def lagrangian(sparsity: Tensor, target: float, lambda1: float | Tensor, lambda2: float | Tensor) -> Tensor:
    """``lambda1 (s - t) + lambda2 (s - t)^2``, a scalar (DPHuBERT, arXiv:2305.17651; Wang et al. 2020)."""
    excess = sparsity - target
    return lambda1 * excess + lambda2 * excess**2


def ascending(multiplier: Tensor) -> Tensor:
    """The same value with the gradient's sign flipped, so that an optimizer that descends ascends on it."""
    return 2 * multiplier.detach() - multiplier


def linear_warmup_decay(update: int, warmup: int, max_update: int, decay: str = "linear") -> float:
    """Factor on every learning rate: rises to 1 over ``warmup`` updates, falls to 0 at the last one.

    ``update`` is the index of the update about to be made; the first is 0, and its factor ``1 / warmup``. It falls in
    a line, or with ``decay`` "cosine" as half a period of it.
    """
    step = update + 1
    if step <= warmup:
        return step / warmup
    left = max(0, max_update - step) / max(1, max_update - warmup)
    return (1 - math.cos(math.pi * left)) / 2 if decay == "cosine" else left


def updates_of(value: float, total: int, field: str) -> int:
    """Updates that a config's value means: a whole number of them, or a fraction of all.

    Args:
        value: 0 or a whole number, or a fraction above 0 and below 1.
        total: updates of the run; looked at for a fraction alone.
        field: where the value comes from, for messages.

    Raises:
        ValueError: it is neither, or a fraction of a run without an end.
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


class CostConstraint(Float32Module):
    """Holds the multipliers and gives the regulariser that drives the student to its target sparsity.

    The student minimises the regulariser while ``lambda1`` and ``lambda2`` maximise it: they are parameters
    (scalars, float32 at any precision, zero at the start, optimizer group ``multipliers``) whose gradient is
    flipped, so that they take part in ordinary, descending optimisation. They must have no weight decay.

    Args:
        target: sparsity to reach, in [0, 1).
        warmup: number of updates over which the target rises from 0.
        cost: what the sparsity is of.

    Raises:
        ValueError: if an argument is out of range.
    """

    param_group = "multipliers"

    def __init__(self, target: float, warmup: int = 5000, cost: Cost = PARAMETERS) -> None:
        super().__init__()
        if not 0.0 <= target < 1.0:
            raise ValueError(
                f"target_sparsity is {target}, but must lie in [0, 1): it is the fraction of the teacher's "
                "parameters to remove; 0.75 leaves a quarter"
            )
        if warmup < 0:
            raise ValueError(f"sparsity warmup is {warmup} updates, but must not be negative; 0 means none")
        self.cost = cost
        self.target = target
        self.warmup = warmup
        self.lambda1 = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.lambda2 = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def target_at(self, update: int) -> float:
        """Target sparsity at an update, the first being 0."""
        return target_sparsity(update, self.warmup, self.target)

    def forward(self, sparsity: Tensor, update: int) -> Tensor:
        """Regulariser at an update, for the expected sparsity (a float32 scalar): a float32 scalar."""
        return lagrangian(sparsity, self.target_at(update), ascending(self.lambda1), ascending(self.lambda2))

    def extra_repr(self) -> str:
        return f"target={self.target}, warmup={self.warmup}, cost={self.cost.name}"


class SizeConstraint(CostConstraint):
    """The constraint on the number of parameters."""

    def __init__(self, target: float, warmup: int = 5000) -> None:
        super().__init__(target, warmup)
