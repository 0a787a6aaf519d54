"""Hard-concrete gates: learned, stochastic zeros and ones (Louizos, Welling & Kingma 2018, arXiv:1712.01312).

The functions are the mathematics, over tensors of any shape unless said; :class:`HardConcrete` is a vector of
gates that samples in training and is deterministic in evaluation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skill_fairseq.modules.fp32 import Float32Module

BETA = 2 / 3
"""Temperature of the concrete distribution."""
STRETCH_MIN, STRETCH_MAX = -0.1, 1.1
"""The interval that the concrete variable is stretched to before it is clamped to [0, 1]."""
EPS = 1e-6
"""Uniform noise is drawn from (EPS, 1 - EPS)."""
MAGIC = 0.8
"""Scale of ``log_alpha`` in evaluation (Wang et al. 2020, "Structured pruning of large language models")."""

_KEEP_SHIFT = BETA * math.log(STRETCH_MAX / -STRETCH_MIN)
_BY_ROUNDING = -1  # in HardConcrete.kept_override: no override


def hard_concrete_sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gate values for given uniform noise (Louizos et al. 2018, eq. 10-11).

    Args:
        log_alpha: location of each gate, float.
        u: uniform noise in (0, 1), of the same shape.

    Returns:
        Values in [0, 1]. Exactly 0 and exactly 1 have positive probability, and no gradient there.
    """
    concrete = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
    return (concrete * (STRETCH_MAX - STRETCH_MIN) + STRETCH_MIN).clamp(0.0, 1.0)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of each gate, differentiable, in the shape of ``log_alpha`` (Louizos et al. 2018, eq. 12)."""
    return torch.sigmoid(log_alpha + _KEEP_SHIFT)


def num_kept(log_alpha: Tensor) -> int:
    """How many units are kept in evaluation: all but the expected number of zeros, rounded half to even.

    Probabilities are taken in float32 and summed in float64, so that the count is the same on every device.
    """
    expected = keep_probability(log_alpha.detach().float()).double().sum().item()
    return log_alpha.numel() - round(log_alpha.numel() - expected)


def kept_units(log_alpha: Tensor) -> Tensor:
    """Which units are kept in evaluation: the :func:`num_kept` largest; of equal ones, the first.

    Args:
        log_alpha: (num_units,) float.

    Returns:
        (num_units,) bool.
    """
    order = torch.sort(log_alpha.detach(), descending=True, stable=True).indices
    mask = torch.zeros_like(log_alpha, dtype=torch.bool)
    mask[order[: num_kept(log_alpha)]] = True
    return mask


def deterministic_gate(log_alpha: Tensor, keep: Tensor | None = None) -> Tensor:
    """Gate values in evaluation: 0 for the units that go, ``sigmoid(0.8 log_alpha / beta)`` for the others.

    Args:
        log_alpha: (num_units,) float.
        keep: (num_units,) bool, the units that stay; by default those of :func:`kept_units`.

    Returns:
        (num_units,) values in [0, 1).
    """
    keep = kept_units(log_alpha) if keep is None else keep
    return torch.sigmoid(log_alpha * (MAGIC / BETA)) * keep.to(log_alpha.dtype)


class Units(NamedTuple):
    """The units that one forward computes. A closed unit adds nothing and gets no gradient, so it may be left out.

    Attributes:
        indices: (k,) ascending, the units computed; None: all of them.
        gate: (k,) float32, their gate values.
        any_open: whether a gate is open at all.
    """

    indices: Tensor | None
    gate: Tensor
    any_open: bool = True


SLICE_BELOW = 0.9
"""Units are sliced where at most this share is open: copying weights costs more than a few closed units."""


def open_units(is_open: Tensor, multiple: int = 1) -> Tensor | None:
    """Which units to compute: the open ones and, to fill up to a multiple, closed ones.

    Where none is open, a closed one is computed, so that every weight gets a gradient (of 0) as it would unsliced.

    Args:
        is_open: (n,) bool, on the CPU.
        multiple: hardware-friendly number of units.

    Returns:
        (k,) ascending indices, or None where slicing does not pay.
    """
    n = is_open.numel()
    k = -(-max(int(is_open.sum()), 1) // multiple) * multiple
    if k > SLICE_BELOW * n:
        return None
    return torch.sort(is_open, descending=True, stable=True).indices[:k].sort().values


class HardConcrete(Float32Module):
    """A vector of gates, one a unit: conv channels, attention heads, FFN units, or one for a whole sublayer.

    The parameter ``log_alpha`` (num_units,) stays float32 in a model of lower precision and belongs to the
    optimizer group ``gates``. Nothing derived from it is cached: loading or editing it takes effect at once.

    Args:
        num_units: number of gates.
        drop_rate: how far the gates are closed at the start, in (0, 1): ``log_alpha`` is drawn around
            ``log((1 - drop_rate) / drop_rate)``. 0.01 opens nearly all units; 0.5 means ``log_alpha`` 0.
        init_std: standard deviation of that draw; it breaks ties between units.

    Attributes:
        multiple: units are computed in multiples of this number, see :meth:`units`.
        generator: source of the noise; None for torch's global one of the gates' device. Noise is drawn on
            the generator's device, so CPU generators of one seed give every rank the same gates. A copied or
            unpickled module starts without one.

    Raises:
        ValueError: if an argument is out of range.
    """

    param_group = "gates"
    kept_override: Tensor

    def __init__(self, num_units: int, drop_rate: float = 0.01, init_std: float = 0.01) -> None:
        super().__init__()
        if num_units < 1:
            raise ValueError(f"num_units is {num_units}, but must be at least 1; leave the gate out instead")
        if not 0.0 < drop_rate < 1.0:
            raise ValueError(f"drop_rate is {drop_rate}, but must lie in (0, 1); 0.01 is usual")
        if init_std < 0.0:
            raise ValueError(f"init_std is {init_std}, but must not be negative; 0 starts all units alike")
        self.drop_rate = drop_rate
        self.init_std = init_std
        self.multiple = 1
        self.generator: torch.Generator | None = None
        self._drawn: Units | None = None
        self.log_alpha = nn.Parameter(torch.empty(num_units, dtype=torch.float32))
        # Of fixed shape, not optional: state dicts load strictly with and without an override.
        self.register_buffer("kept_override", torch.full((num_units,), _BY_ROUNDING, dtype=torch.int8))
        self.reset_parameters()

    @property
    def num_units(self) -> int:
        return self.log_alpha.numel()

    def reset_parameters(self) -> None:
        """Draws ``log_alpha`` afresh and lifts an override of the kept units."""
        nn.init.normal_(self.log_alpha, math.log((1 - self.drop_rate) / self.drop_rate), self.init_std)
        self.set_kept(None)

    def forward(self) -> Tensor:
        """z, (num_units,) float32 in [0, 1]: a fresh sample in training, deterministic in evaluation."""
        if not self.training:
            return deterministic_gate(self.log_alpha, self.kept())
        device = self.log_alpha.device if self.generator is None else self.generator.device
        noise = torch.rand(self.num_units, generator=self.generator, device=device, dtype=torch.float32)
        return hard_concrete_sample(self.log_alpha, EPS + (1 - 2 * EPS) * noise.to(self.log_alpha.device))

    def units(self) -> Units:
        """The units to compute in this forward, with their gates, which are drawn now or by :func:`draw_together`."""
        if self._drawn is not None:
            return self._drawn
        z = self()
        return _units(z, z.detach().cpu() > 0, self.multiple)

    def expected_kept(self) -> Tensor:
        """Expected number of open gates, a differentiable float32 scalar."""
        return keep_probability(self.log_alpha).sum()

    def kept(self) -> Tensor:
        """Which units stay in evaluation, (num_units,) bool: the override if any, else by rounding."""
        if (self.kept_override == _BY_ROUNDING).all():
            return kept_units(self.log_alpha)
        return self.kept_override == 1

    def set_kept(self, mask: Tensor | None) -> None:
        """Fixes which units stay in evaluation, (num_units,) bool; None returns to rounding.

        The choice is saved with the state. Training does not look at it: lift it when training goes on.

        Raises:
            ValueError: if the mask has another shape or dtype.
        """
        if mask is None:
            self.kept_override.fill_(_BY_ROUNDING)
            return
        if mask.dtype != torch.bool or mask.shape != self.kept_override.shape:
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}, but must be torch.bool of shape "
                f"({self.num_units},): True for each unit to keep"
            )
        self.kept_override.copy_(mask)

    def extra_repr(self) -> str:
        return f"num_units={self.num_units}, drop_rate={self.drop_rate}"

    def __getstate__(self) -> dict[str, Any]:
        # Generators belong to a run, and cannot be copied by every torch.
        return {**self.__dict__, "generator": None, "_drawn": None}


def _units(z: Tensor, is_open: Tensor, multiple: int) -> Units:
    index = open_units(is_open, multiple)
    if index is None:
        return Units(None, z, bool(is_open.any()))
    index = index.to(z.device)
    return Units(index, z[index], bool(is_open.any()))


@contextlib.contextmanager
def draw_together(gates: Sequence[HardConcrete]) -> Iterator[None]:
    """Inside, :meth:`HardConcrete.units` of these gates gives one draw, made here.

    Which units are open must be known on the host: drawn together, a GPU is waited for once and not once a gate.
    """
    samples = [gate() for gate in gates]
    masks = torch.cat([z.detach() > 0 for z in samples]).cpu() if samples else torch.empty(0)
    try:
        for gate, z, is_open in zip(gates, samples, masks.split([gate.num_units for gate in gates])):
            gate._drawn = _units(z, is_open, gate.multiple)
        yield
    finally:
        for gate in gates:
            gate._drawn = None
