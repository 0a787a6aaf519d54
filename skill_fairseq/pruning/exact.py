"""An exact constraint: one shift of all gates' ``log_alpha`` makes the expected cost equal to the target.

Let ``a`` be the gates' ``log_alpha`` and ``c`` the shift that solves ``E[cost](a + c) = target``. Training minimises
the unconstrained function ``a -> loss(a + c(a))``. As ``dc/da_i = -e_i / sum e`` with ``e = dE[cost]/da`` at ``a + c``,
its gradient is ``g - (sum g) w``, where ``g`` is the loss's gradient and ``w = e / sum e``: a gate opens only if it is
worth more than it costs. This is the Lagrangian's gradient with the multiplier that keeps the cost in this update.
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
"""Largest difference from the target sparsity that needs no shift: a repeated shift changes no bit. Rounding of
``log_alpha`` to float32 is far below."""
BISECTIONS = 18
"""Bisections of an interval about 100 wide, which leaves 4e-4: a line through its ends is off by less than 1e-8."""
_SATURATED = 30.0  # sigmoid of it differs from 1 by 1e-13


def solve_shift(excess: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The zero of a function that falls as the shift rises; the nearer end if there is no zero between the ends.

    Bisects, then takes a line through the ends of the last interval. The number of steps is fixed and no value is read
    from the device, so the host does not wait.

    Args:
        excess: maps a float64 scalar to a float64 scalar.
        low, high: the ends, float64 scalars.

    Returns:
        a float64 scalar on the device of the ends.
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
    """A dead weak reference."""


class ExactConstraint(Constraint):
    """Keeps the expected cost at its target in every update by shifting all gates, without multipliers.

    It has no state: the shift is added to ``log_alpha``. Gates never open further than at the start, so the first
    updates of a target that rises from 0 keep the initial sparsity. All gates move, including those on which no cost
    depends. Arguments are those of :class:`Constraint`. In your own loop::

        constraint = ExactConstraint(target=0.7, warmup=5000)
        for update, batch in enumerate(batches):
            constraint.impose(gates, update)
            loss = model(batch)
            ...

    Call ``constraint.impose(gates, updates)`` after the last update.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._worth: Optional[Tensor] = None  # w above, for the current gates
        self._start: Optional[List[float]] = None  # initial sparsity of each cost
        self._hook: Any = None
        self._hooked: Callable[[], Any] = _none  # the parameter, weakly

    def forward(self, sparsity: Any, update: int) -> float:
        """The constraint's term of the loss: none."""
        return 0.0

    def impose(self, gates: Any, update: int) -> None:
        """Shifts all ``log_alpha`` in place so that the expected cost meets the target at an update.

        From then on, gradients of ``log_alpha`` take the next shift into account.

        Args:
            gates: the result of :func:`gate`, or a gated encoder.
            update: index of the next update, from 0.

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
        """The shift of all ``log_alpha`` that makes the expected sparsities equal to ``held``, a float64 scalar."""
        excess = self._excess(encoder, held)
        with torch.no_grad():
            values = encoder.gates.log_alpha.double()  # type: ignore[union-attr]
            shift = solve_shift(excess, -values.max() - _SATURATED, -values.min() + _SATURATED)
            return torch.where(excess(torch.zeros_like(shift)).abs() <= EXACT, torch.zeros_like(shift), shift)

    def worth(self, encoder: SpeechEncoder, held: List[float], shift: Optional[Tensor] = None) -> Tensor:
        """w of each gate at a shift, (n,) float32; 0 for gates that are saturated."""
        log_alpha = encoder.gates.log_alpha  # type: ignore[union-attr]
        with torch.enable_grad():  # through per-gate shifts: a gradient of log_alpha would run the hook
            shifts = torch.zeros_like(log_alpha, dtype=torch.float64) if shift is None else shift.expand_as(log_alpha)
            shifts = shifts.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self._excess(encoder, held)(shifts), shifts)
        return torch.nan_to_num(slope / slope.sum()).float()

    def _excess(self, encoder: SpeechEncoder, held: List[float]) -> Callable[[Tensor], Tensor]:
        """A function from a shift to the expected sparsity less the target."""
        originals = [target.cost.original(encoder.config) for target in self.targets]

        def excess(shift: Tensor) -> Tensor:
            widths = expected_widths(encoder, shift)
            costs: List[Any] = [target.cost(encoder.config, widths) for target in self.targets]
            return least_excess([1 - cost / original for cost, original in zip(costs, originals)], held)

        return excess

    def held_at(self, encoder: SpeechEncoder, update: int) -> List[float]:
        """The target sparsity of each cost at an update."""
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
