"""The constraint by construction: one shift of all gates' ``log_alpha`` makes the expected cost the target.

With ``a`` the gates' ``log_alpha`` and ``c`` the shift that solves ``E[cost](a + c) = target``, training is that of the
unconstrained function ``a -> loss(a + c(a))``. As ``dc/da_i = -e_i / sum e`` with ``e = dE[cost]/da`` at ``a + c``, its
gradient is ``g - (sum g) w``, where ``g`` is the loss's and ``w = e / sum e``: a gate opens only as far as it is worth
more than what it costs. That is the Lagrangian's gradient with the multiplier which keeps the cost in this update.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, List, Optional

import torch
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.expected import expected_widths, starting_widths
from skill_fairseq.pruning.selection import check_reachable
from skill_fairseq.pruning.targets import Constraint, least_excess

EXACT = 1e-6
"""Difference from the target, in sparsity, up to which nothing is shifted: gates that have been shifted stay as they
are when they are shifted again, bit for bit. Rounding of ``log_alpha`` to float32 is far below."""
BISECTIONS = 18
"""Of an interval some 100 wide, which leaves 4e-4: a line through its ends is off by less than 1e-8."""
_SATURATED = 30.0  # sigmoid of it differs from 1 by 1e-13


def solve_shift(excess: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a function that falls as the shift rises crosses 0; the nearer end where it does not between two ends.

    Bisection, and a line through the ends of the last interval. The number of steps is fixed and nothing is asked of
    the device, so that the host need not wait for it.

    Args:
        excess: of a float64 scalar, to a float64 scalar.
        low, high: ends, float64 scalars.

    Returns:
        float64 scalar on the device of the ends.
    """
    above, below = excess(low), excess(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        value = excess(middle)
        over = value > 0
        low, above = torch.where(over, middle, low), torch.where(over, value, above)
        high, below = torch.where(over, high, middle), torch.where(over, below, value)
    share = (above / (above - below).clamp(min=1e-300)).clamp(0.0, 1.0)
    return low + (high - low) * share


def _none() -> None:
    """Nothing: a weak reference to what is gone."""


class ExactConstraint(Constraint):
    """Keeps the expected cost at its target in every update by a shift of all gates, without multipliers.

    It has no state: the shift goes into ``log_alpha``. Gates are never opened beyond where they start, so that the
    first updates of a target that rises from 0 keep the start's sparsity. All gates move, also those of which no cost
    depends. Arguments are those of :class:`Constraint`. In your own loop::

        constraint = ExactConstraint(target=0.7, warmup=5000)
        for update, batch in enumerate(batches):
            constraint.impose(gates, update)
            loss = model(batch)
            ...

    and ``constraint.impose(gates, updates)`` after the last update.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._worth: Optional[Tensor] = None  # w above, of the present gates
        self._start: Optional[List[float]] = None  # sparsity of each cost where gates start
        self._hook: Any = None
        self._hooked: Callable[[], Any] = _none  # the parameter, weakly

    def forward(self, sparsity: Any, update: int) -> float:
        """What the loss gets for the constraint: nothing."""
        return 0.0

    def impose(self, gates: Any, update: int) -> None:
        """Shifts all ``log_alpha`` in place so that the expected cost is the target at an update.

        Gradients that reach ``log_alpha`` from then on take into account that a shift follows.

        Args:
            gates: what :func:`gate` gave, or a gated encoder.
            update: about to be made; the first is 0.

        Raises:
            ValueError: the gates cannot reach a target.
        """
        encoder: SpeechEncoder = getattr(gates, "encoder", gates)
        log_alpha = encoder.gates.log_alpha  # type: ignore[union-attr]
        held = self.held_at(encoder, update)
        with torch.no_grad():
            log_alpha.copy_(log_alpha.double() + self.shift_to(encoder, held))
        self._worth = self.worth(encoder, held)
        if self._hooked() is not log_alpha:
            if self._hook is not None:
                self._hook.remove()
            self._hooked, self._hook = weakref.ref(log_alpha), log_alpha.register_hook(self._gradient)

    def shift_to(self, encoder: SpeechEncoder, held: List[float]) -> Tensor:
        """What added to all ``log_alpha`` makes the expected sparsities those ``held``, a float64 scalar."""
        excess = self._excess(encoder, held)
        with torch.no_grad():
            values = encoder.gates.log_alpha.double()  # type: ignore[union-attr]
            shift = solve_shift(excess, -values.max() - _SATURATED, -values.min() + _SATURATED)
            return torch.where(excess(torch.zeros_like(shift)).abs() <= EXACT, torch.zeros_like(shift), shift)

    def worth(self, encoder: SpeechEncoder, held: List[float], shift: Optional[Tensor] = None) -> Tensor:
        """w of each gate, (n,) float32, with all moved by a shift; 0 for those that are shut or open for good."""
        log_alpha = encoder.gates.log_alpha  # type: ignore[union-attr]
        with torch.enable_grad():  # by each gate's own shift: a gradient of log_alpha would pass the hook
            shifts = torch.zeros_like(log_alpha, dtype=torch.float64) if shift is None else shift.expand_as(log_alpha)
            shifts = shifts.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self._excess(encoder, held)(shifts), shifts)
        return torch.nan_to_num(slope / slope.sum()).float()

    def _excess(self, encoder: SpeechEncoder, held: List[float]) -> Callable[[Tensor], Tensor]:
        """Of a shift, the expected sparsity less the one that is held."""
        originals = [target.cost.original(encoder.config) for target in self.targets]

        def excess(shift: Tensor) -> Tensor:
            widths = expected_widths(encoder, shift)
            costs: List[Any] = [target.cost(encoder.config, widths) for target in self.targets]
            return least_excess([1 - cost / original for cost, original in zip(costs, originals)], held)

        return excess

    def held_at(self, encoder: SpeechEncoder, update: int) -> List[float]:
        """The sparsity of each cost that the gates are shifted to at an update."""
        if self._start is None:
            for target in self.targets:
                check_reachable(encoder.config, target.sparsity, "target", target.cost)
            widths = starting_widths(encoder)
            self._start = [float(target.cost.sparsity(encoder.config, widths)) for target in self.targets]
        return [
            max(now, min(start, target.sparsity))
            for now, start, target in zip(self.targets_at(update), self._start, self.targets)
        ]

    def _gradient(self, gradient: Tensor) -> Tensor:
        return gradient if self._worth is None else gradient - gradient.sum() * self._worth

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worth": None, "_hook": None, "_hooked": _none}  # copies have other gates
