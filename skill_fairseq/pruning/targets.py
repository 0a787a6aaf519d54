"""What a student is held to: targets for its costs, how they rise over a run, and how far it is from them.

Costs enter as sparsity, ``s = 1 - E[cost] / original cost``, see :mod:`skill_fairseq.pruning.costs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, List, NamedTuple, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.fp32 import Float32Module
from skill_fairseq.pruning.costs import PARAMETERS, Cost

SCHEDULES = ("linear", "cosine", "exponential")
"""How a target may rise."""


class Target(NamedTuple):
    """One cost and how much of it is to go.

    Attributes:
        cost: the cost.
        sparsity: fraction of the original cost to remove, in [0, 1).
    """

    cost: Cost
    sparsity: float


def target_sparsity(update: int, warmup: int, final: float, schedule: str = "linear") -> float:
    """Target at an update (the first is 0): rises from 0 to ``final`` over ``warmup`` updates.

    It rises in a line (DPHuBERT, arXiv:2305.17651), with "cosine" as half a period of it, slow at both ends, and with
    "exponential" so that what is left of the cost falls by the same factor in every update.
    """
    if update >= warmup:
        return final
    if schedule == "cosine":
        return final * (1 - math.cos(math.pi * update / warmup)) / 2
    if schedule == "exponential":
        return 1 - (1 - final) ** (update / warmup)
    return final * update / warmup


def least_excess(sparsities: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Sparsity less its target, a scalar with gradient: of several the smallest, that of the target which binds."""
    found = [sparsity - target for sparsity, target in zip(sparsities, targets)]
    return found[0] if len(found) == 1 else torch.stack(found).min()


class Constraint(Float32Module):
    """Targets for the student's costs and their rise; subclasses say how the gates are brought there.

    Args:
        target: sparsity to reach, in [0, 1), of ``cost``; or a list of targets, all of which are to be met: the one
            that is farthest off binds.
        warmup: number of updates over which targets rise from 0.
        cost: what the sparsity is of.
        schedule: how they rise, one of :data:`SCHEDULES`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        target: float | Sequence[Target],
        warmup: int = 5000,
        cost: Cost = PARAMETERS,
        schedule: str = "linear",
    ) -> None:
        super().__init__()
        self.targets: Tuple[Target, ...] = (
            (Target(cost, target),) if isinstance(target, (int, float)) else tuple(Target(*each) for each in target)
        )
        if not self.targets:
            raise ValueError("target: none is given; expected a sparsity such as 0.75, or a list of targets")
        for each in self.targets:
            if not 0.0 <= each.sparsity < 1.0:
                raise ValueError(
                    f"target_sparsity is {each.sparsity}, but must lie in [0, 1): it is the fraction of the teacher's "
                    "parameters to remove; 0.75 leaves a quarter"
                )
        if warmup < 0:
            raise ValueError(f"sparsity warmup is {warmup} updates, but must not be negative; 0 means none")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: {schedule!r}; expected one of {', '.join(SCHEDULES)}")
        self.warmup = warmup
        self.schedule = schedule

    @property
    def target(self) -> float:
        """The first target's sparsity."""
        return self.targets[0].sparsity

    @property
    def cost(self) -> Cost:
        """The first target's cost."""
        return self.targets[0].cost

    def target_at(self, update: int) -> float:
        """The first target's sparsity at an update, the first being 0."""
        return self.targets_at(update)[0]

    def targets_at(self, update: int) -> List[float]:
        """Target sparsity of each cost at an update, the first being 0."""
        return [target_sparsity(update, self.warmup, each.sparsity, self.schedule) for each in self.targets]

    def impose(self, gates: Any, update: int) -> None:
        """Called before the forward of an update, with :class:`Gates` or a gated encoder; most need nothing."""

    def extra_repr(self) -> str:
        held = ", ".join(f"{each.sparsity} of {each.cost.name}" for each in self.targets)
        return f"target={held}, warmup={self.warmup}, schedule={self.schedule}"
