"""Elastic training: all sizes between two ends in one run.

Each update trains the largest size, the smallest size and some random sizes between (the "sandwich rule" of Yu & Huang
2019, arXiv:1903.05134), each against the teacher.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.prepared import state_of
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.nested import SETTLED, NestedOrder
from skill_fairseq.pruning.targets import target_sparsity


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shares of a cost to keep, in (0, 1).

    Attributes:
        smallest, largest: the ends.
        between: number of random sizes between them per update.
        valid: sizes to validate; empty: smallest, middle and largest.

    Raises:
        ValueError: a field is out of range.
    """

    smallest: float
    largest: float
    between: int = 1
    valid: Tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("smallest", "largest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(f"{name}: {value!r}; expected a share to keep, above 0 and below 1, such as 0.25")
        if self.smallest >= self.largest:
            raise ValueError(f"smallest: {self.smallest}; expected less than largest={self.largest}")
        if isinstance(self.between, bool) or not isinstance(self.between, int) or not 0 <= self.between <= 16:
            raise ValueError(f"between: {self.between!r}; expected a number of sizes, 0 to 16")
        for value in self.valid:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.has(value):
                raise ValueError(f"valid: {value!r}; expected sizes from {self.smallest} to {self.largest}")
        if not self.valid:
            middle = round((self.smallest + self.largest) / 2, 4)
            object.__setattr__(self, "valid", (self.smallest, middle, self.largest))

    def has(self, size: float) -> bool:
        """Whether a size is in the trained range."""
        return self.smallest - 1e-9 <= size <= self.largest + 1e-9


def read_sizes(given: Any, field: str) -> Sizes:
    """Parses sizes from a config, ``{smallest: 0.1, largest: 0.5, between: 1}``.

    Raises:
        ValueError: names the field, the value and the expectation.
    """
    names = [each.name for each in dataclasses.fields(Sizes)]
    if not isinstance(given, Mapping) or not {"smallest", "largest"} <= set(given) or set(given) - set(names):
        raise ValueError(f"{field}: {given!r}; expected {{smallest: 0.1, largest: 0.5}} (and between, valid)")
    fields = dict(given)
    valid = fields.pop("valid", None)
    if valid is not None and not isinstance(valid, (list, tuple)):
        raise ValueError(f"{field}.valid: {valid!r}; expected a list of sizes, such as [0.1, 0.25, 0.5]")
    try:
        return Sizes(**fields, valid=tuple(valid or ()))
    except ValueError as error:
        raise ValueError(f"{field}.{error}") from error


class _Shift(torch.autograd.Function):
    """``log_alpha`` plus a shift that keeps a cost; the gradient includes the shift, see :mod:`pruning.exact`."""

    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, shift: Tensor, worth: Tensor) -> Tensor:
        ctx.save_for_backward(worth)
        return (log_alpha.double() + shift).to(log_alpha.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        (worth,) = ctx.saved_tensors
        return grad - grad.sum() * worth, None, None


class ElasticConstraint(ExactConstraint):
    """Stage 1: keeps gates at the largest size; further shifts give the other sizes.

    Args:
        sizes: the sizes to train.
        warmup, schedule: how the sparsity of every size rises from 0.
        cost: the cost that sizes refer to.
    """

    def __init__(self, sizes: Sizes, warmup: int = 0, cost: Cost = PARAMETERS, schedule: str = "linear") -> None:
        super().__init__(1 - sizes.largest, warmup, cost, schedule)
        self.sizes = sizes

    def sizes_at(self, update: int, seed: int) -> List[float]:
        """The sizes of an update: largest, smallest, and random ones between, seeded by seed and update."""
        draws, sizes = random.Random(f"{seed} {update}"), self.sizes
        return [
            *(sizes.largest, sizes.smallest),
            *(draws.uniform(sizes.smallest, sizes.largest) for _ in range(sizes.between)),
        ]

    def log_alpha(self, encoder: SpeechEncoder, size: float, update: int) -> Optional[Tensor]:
        """(n,) ``log_alpha`` at which the gates expect a size, with gradient; None for the largest, which they already
        have.

        Call :meth:`impose` first.
        """
        assert encoder.gates is not None
        if size == self.sizes.largest:
            return None
        (largest,) = self.held_at(encoder, update)
        held = [max(target_sparsity(update, self.warmup, 1 - size, self.schedule), largest)]
        shift = self.shift_to(encoder, held)
        return _Shift.apply(encoder.gates.log_alpha, shift, self.worth(encoder, held, shift))  # type: ignore


class NestedSizes(ElasticConstraint):
    """Stage 2: a size is the first units of a fixed order, see :func:`pruning.nested.settle`."""

    def __init__(self, sizes: Sizes, cost: Cost = PARAMETERS) -> None:
        super().__init__(sizes, 0, cost)
        self._order: Optional[Tuple[Any, NestedOrder]] = None

    def impose(self, gates: Any, update: int) -> None:
        """Does nothing."""

    def log_alpha(self, encoder: SpeechEncoder, size: float, update: int) -> Optional[Tensor]:
        """(n,) ``log_alpha`` that opens the units of a size, with the value 1, and closes the others."""
        assert encoder.gates is not None
        order = encoder.gates.log_alpha.detach()
        if size == self.sizes.largest:
            return None
        key = state_of(encoder.gates)
        if self._order is None or self._order[0] != key:
            self._order = key, NestedOrder(encoder, self.cost)
        mask = self._order[1].mask(size).to(order.device)
        return torch.where(mask, order, torch.full_like(order, -SETTLED))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_order": None}
