"""Hard-concrete gates: learned, stochastic zeros and ones (Louizos, Welling & Kingma 2018, arXiv:1712.01312).

The mathematics as functions, over tensors of any shape unless said. :mod:`skill_fairseq.modules.gate_bank` holds the
parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BETA = 2 / 3
"""Temperature of the concrete distribution."""
STRETCH_MIN, STRETCH_MAX = -0.1, 1.1
"""The interval that the concrete variable is stretched to before it is clamped to [0, 1]."""
EPS = 1e-6
"""Uniform noise is drawn from (EPS, 1 - EPS)."""
MAGIC = 0.8
"""Scale of ``log_alpha`` in evaluation (Wang et al. 2020, "Structured pruning of large language models")."""

_KEEP_SHIFT = BETA * math.log(STRETCH_MAX / -STRETCH_MIN)


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
"""Units are sliced where at most this share is open, elsewhere closed ones are multiplied by 0: copying weights costs
more than a few closed units. By arithmetic alike on a GPU: Base's FFN on 160 s in bf16 takes about 1 ms there and back,
of which a tenth is what gathering and scattering 2 x 3072 x 768 weights takes."""
GPU_MULTIPLE = 64
"""Units to a tile of tensor cores, 128 bytes in 16 bits."""


def multiple_on(device: torch.device, multiple: int) -> int:
    """The multiple of units that a device computes well: the gate's own on CPUs, whole tiles elsewhere.

    Heads, of multiple 1, are 64 rows wide already. Fewer widths also are fewer kernels and sizes of memory to keep.
    """
    return multiple if device.type == "cpu" or multiple == 1 else max(multiple, GPU_MULTIPLE)


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
    k = -(-max(int(is_open.numpy().sum()), 1) // multiple) * multiple
    if k > SLICE_BELOW * n:
        return None
    return torch.sort(is_open, descending=True, stable=True).indices[:k].sort().values
