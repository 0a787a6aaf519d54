"""Targets for a student's costs, how they rise over a run, and the distance to them.

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
from skill_fairseq.pruning import latency  # noqa: F401  (registers its cost)
from skill_fairseq.pruning.costs import COSTS, PARAMETERS, Cost, make_cost, saved_cost

SCHEDULES = ("linear", "cosine", "exponential")
"""Schedules of a target's rise."""


class Target(NamedTuple):
    """One cost and its target sparsity.

    Attributes:
        cost: the cost.
        sparsity: fraction of the original cost to remove, in [0, 1).
    """

    cost: Cost
    sparsity: float


Asked = Union[float, Sequence[Target]]
"""A sparsity of some cost, or a list of targets, all of which must be met."""


def as_targets(asked: Asked, cost: Cost = PARAMETERS) -> Tuple[Target, ...]:
    """Converts a sparsity of a cost to a target; returns targets unchanged.

    Raises:
        ValueError: there is no target.
    """
    targets = (Target(cost, asked),) if isinstance(asked, (int, float)) else tuple(Target(*each) for each in asked)
    if not targets:
        raise ValueError("target: empty; expected a sparsity such as 0.75, or a list of targets")
    return targets


def read_targets(asked: Any, field: str) -> Tuple[Target, ...]:
    """Parses a config's targets: which share of each cost to keep, such as ``{macs: 0.25, seconds: 10}``.

    Args:
        asked: name of a cost -> share to keep, in (0, 1], or ``latency_ms`` -> milliseconds, for one or several costs;
            and settings of these costs by name.
        field: config field, for messages.

    Raises:
        ValueError: names the field and the problem.
    """
    names = {name: kind for kind in COSTS.values() for name in (kind.name, kind.absolute) if name}
    if not isinstance(asked, Mapping) or not any(name in names for name in asked):
        raise ValueError(
            f"{field}: {asked!r}; expected the share to keep of one or several costs, such as {{macs: 0.25}}; known "
            f"costs are {', '.join(names)}"
        )
    given = {name: names[name] for name in asked if name in names}
    settings = {name: value for name, value in asked.items() if name not in names}
    known = {each.name for kind in given.values() for each in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            expected = f"a cost ({', '.join(names)})" + (f" or a setting ({', '.join(sorted(known))})" if known else "")
            raise ValueError(f"{field}.{name}: {settings[name]!r}; {name} is not known, expected {expected}")
    targets = []
    for name, kind in given.items():
        value = asked[name]
        try:
            cost = make_cost(kind.name, **{f"cost_{setting}": v for setting, v in settings.items()})
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error
        most = cost.unpruned() if name == kind.absolute else 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            expected = (
                f"at most the {most:.4g} before pruning" if name == kind.absolute else "at most 1: 0.25 is a quarter"
            )
            raise ValueError(f"{field}.{name}: {value!r}; expected the share or amount to keep, above 0 and {expected}")
        targets.append(Target(cost, 1 - value / most))
    return tuple(targets)


def saved_targets(provenance: Mapping[str, Any]) -> Tuple[Target, ...]:
    """A checkpoint's targets, from its provenance; empty if it has none.

    Raises:
        ValueError: the cost is not registered here, or a target is not usable.
    """
    if provenance.get("target"):
        return read_targets(provenance["target"], "target")
    sparsity = provenance.get("target_sparsity")
    return () if sparsity is None else (Target(saved_cost(provenance), sparsity),)


def target_sparsity(update: int, warmup: int, final: float, schedule: str = "linear") -> float:
    """Target at an update (the first is 0): rises from 0 to ``final`` over ``warmup`` updates.

    The rise is linear (DPHuBERT, arXiv:2305.17651), "cosine" (half a period, slow at both ends), or "exponential" (the
    remaining cost falls by the same factor in every update).
    """
    if update >= warmup:
        return final
    if schedule == "cosine":
        return final * (1 - math.cos(math.pi * update / warmup)) / 2
    if schedule == "exponential":
        return 1 - (1 - final) ** (update / warmup)
    return final * update / warmup


def least_excess(sparsities: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Sparsity less its target, a scalar with gradient; with several targets the smallest, of the binding target."""
    found = [sparsity - target for sparsity, target in zip(sparsities, targets)]
    return found[0] if len(found) == 1 else torch.stack(found).min()


class Constraint(Float32Module):
    """Targets for the student's costs and their rise; subclasses implement how gates reach them.

    Args:
        target: sparsity to reach, in [0, 1), of ``cost``; or a list of targets, all of which must be met: the
            farthest one binds.
        warmup: number of updates over which targets rise from 0.
        cost: the cost that the sparsity refers to.
        schedule: one of :data:`SCHEDULES`.

    Raises:
        ValueError: an argument is out of range.
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
        """Called before the forward of an update, with :class:`Gates` or a gated encoder; does nothing by default."""

    def extra_repr(self) -> str:
        held = ", ".join(f"{each.sparsity} of {each.cost.name}" for each in self.targets)
        return f"target={held}, warmup={self.warmup}, schedule={self.schedule}"
