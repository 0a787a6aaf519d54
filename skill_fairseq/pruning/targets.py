"""What a student is held to: targets for its costs, how they rise over a run, and how far it is from them.

Costs enter as sparsity, ``s = 1 - E[cost] / original cost``, see :mod:`skill_fairseq.pruning.costs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, List, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor

from skill_fairseq.modules.fp32 import Float32Module
from skill_fairseq.pruning.costs import COSTS, PARAMETERS, Cost, make_cost, saved_cost

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


Asked = Union[float, Sequence[Target]]
"""A sparsity of some cost, or targets that are all to be met."""


def as_targets(asked: Asked, cost: Cost = PARAMETERS) -> Tuple[Target, ...]:
    """A sparsity of a cost as a target, targets as they are.

    Raises:
        ValueError: there is none.
    """
    targets = (Target(cost, asked),) if isinstance(asked, (int, float)) else tuple(Target(*each) for each in asked)
    if not targets:
        raise ValueError("target: none is given; expected a sparsity such as 0.75, or a list of targets")
    return targets


def read_targets(asked: Any, field: str) -> Tuple[Target, ...]:
    """Targets as a config gives them: how much of which cost is to be left, such as ``{macs: 0.25, seconds: 10}``.

    Args:
        asked: name of a cost to the share of it that is to be left, in (0, 1], for one cost or several; and settings
            of these costs by their names.
        field: where it was asked for, for messages.

    Raises:
        ValueError: names the field and what is wrong.
    """
    if not isinstance(asked, Mapping) or not any(name in COSTS for name in asked):
        raise ValueError(
            f"{field}: {asked!r}; expected the share that is to be left of one or several costs, as {{macs: 0.25}}; "
            f"known are {', '.join(COSTS)}"
        )
    kinds = [COSTS[name] for name in asked if name in COSTS]
    settings = {name: value for name, value in asked.items() if name not in COSTS}
    known = {each.name for kind in kinds for each in dataclasses.fields(kind)}
    if not settings.keys() <= known:
        unknown = next(name for name in settings if name not in known)
        expected = f"a cost ({', '.join(COSTS)})" + (f" or a setting ({', '.join(sorted(known))})" if known else "")
        raise ValueError(f"{field}.{unknown}: {settings[unknown]!r}; {unknown} is not known, expected {expected}")
    targets = []
    for kind in kinds:
        left = asked[kind.name]
        if isinstance(left, bool) or not isinstance(left, (int, float)) or not 0 < left <= 1:
            raise ValueError(
                f"{field}.{kind.name}: {left!r}; expected the share that is to be left, above 0 and at most 1: 0.25 "
                "leaves a quarter"
            )
        try:
            cost = make_cost(kind.name, **{f"cost_{name}": value for name, value in settings.items()})
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error
        targets.append(Target(cost, 1 - left))
    return tuple(targets)


def saved_targets(provenance: Mapping[str, Any]) -> Tuple[Target, ...]:
    """What a checkpoint was trained for, from its provenance; empty where it says nothing.

    Raises:
        ValueError: it is of a cost that is not registered here, or not usable.
    """
    if provenance.get("target"):
        return read_targets(provenance["target"], "target")
    sparsity = provenance.get("target_sparsity")
    return () if sparsity is None else (Target(saved_cost(provenance), sparsity),)


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
        target: Asked,
        warmup: int = 5000,
        cost: Cost = PARAMETERS,
        schedule: str = "linear",
    ) -> None:
        super().__init__()
        self.targets = as_targets(target, cost)
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
