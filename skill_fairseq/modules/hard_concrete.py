"""Hard-concrete gates: learned, stochastic zeros and ones (Louizos, Welling & Kingma 2018, arXiv:1712.01312).

Pure functions, over tensors of any shape unless noted. :mod:`skill_fairseq.modules.gate_bank` holds the parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BETA = 2 / 3
"""Temperature of the concrete distribution."""
STRETCH_MIN, STRETCH_MAX = -0.1, 1.1
"""Interval to which the concrete variable is stretched before clamping to [0, 1]."""
EPS = 1e-6
"""Uniform noise is drawn from (EPS, 1 - EPS)."""
MAGIC = 0.8
"""Scale of ``log_alpha`` in evaluation (Wang et al. 2020, "Structured pruning of large language models")."""

_KEEP_SHIFT = BETA * math.log(STRETCH_MAX / -STRETCH_MIN)


def hard_concrete_sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gate values for given uniform noise (Louizos et al. 2018, eq. 10-11).

    Args:
        log_alpha: location of each gate, float.
        u: uniform noise in (0, 1), same shape.

    Returns:
        values in [0, 1]. Exact 0 and 1 have positive probability and no gradient.
    """
    concrete = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
    return (concrete * (STRETCH_MAX - STRETCH_MIN) + STRETCH_MIN).clamp(0.0, 1.0)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of each gate, differentiable, in the shape of ``log_alpha`` (Louizos et al. 2018, eq. 12)."""
    return torch.sigmoid(log_alpha + _KEEP_SHIFT)


def num_kept(log_alpha: Tensor) -> int:
    """Number of units kept in evaluation: all but the expected number of zeros, rounded half to even.

    Probabilities are float32 and summed in float64, so that the count is the same on every device.
    """
    expected = keep_probability(log_alpha.detach().float()).double().sum().item()
    return log_alpha.numel() - round(log_alpha.numel() - expected)


def kept_units(log_alpha: Tensor) -> Tensor:
    """Units kept in evaluation: the :func:`num_kept` largest, in a tie the first.

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
    """Gate values in evaluation: 0 for dropped units, ``sigmoid(0.8 log_alpha / beta)`` for kept ones.

    Args:
        log_alpha: (num_units,) float.
        keep: (num_units,) bool, the units to keep; by default those of :func:`kept_units`.

    Returns:
        (num_units,) values in [0, 1).
    """
    keep = kept_units(log_alpha) if keep is None else keep
    return torch.sigmoid(log_alpha * (MAGIC / BETA)) * keep.to(log_alpha.dtype)


class Units(NamedTuple):
    """The units that a forward computes. A closed unit adds nothing and gets no gradient, so it can be skipped.

    Attributes:
        indices: (k,) ascending, the computed units; None: all of them.
        gate: (k,) float32, their gate values.
        any_open: whether any gate is open.
    """

    indices: Tensor | None
    gate: Tensor
    any_open: bool = True


SLICE_BELOW = 0.9
"""Units are sliced if at most this share is open; otherwise closed ones are multiplied by 0, because copying weights
costs more than a few closed units. The same is estimated for a GPU: Base's FFN on 160 s in bf16 takes about 1 ms
forward and backward, a tenth of which is the time to gather and scatter 2 x 3072 x 768 weights."""
GPU_MULTIPLE = 64
"""Units per tile of tensor cores: 128 bytes in 16 bits."""


def multiple_on(device: torch.device, multiple: int) -> int:
    """The multiple of units that a device computes efficiently: the gate's own on CPUs, whole tiles elsewhere.

    Heads, with multiple 1, already have 64 rows. Fewer widths also mean fewer kernels and memory sizes.
    """
    return multiple if device.type == "cpu" or multiple == 1 else max(multiple, GPU_MULTIPLE)


def open_units(is_open: Tensor, multiple: int = 1) -> Tensor | None:
    """The units to compute: the open ones, and closed ones to fill up to a multiple.

    If none is open, a closed one is computed, so that every weight gets a gradient (of 0), as without slicing.

    Args:
        is_open: (n,) bool, on the CPU.
        multiple: hardware-friendly number of units.

    Returns:
        (k,) ascending indices, or None if slicing does not pay.
    """
    n = is_open.numel()
    k = -(-max(int(is_open.numpy().sum()), 1) // multiple) * multiple
    if k > SLICE_BELOW * n:
        return None
    return torch.sort(is_open, descending=True, stable=True).indices[:k].sort().values
