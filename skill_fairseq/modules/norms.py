"""Layer normalisation with statistics over the original width after channels were removed."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.slicing import take

MOST_WINDOWS = 1 << 18
"""Windows of the first convolution to convert to float64 at a time (80 s)."""


class Moments(NamedTuple):
    """Statistics over time, float64.

    Attributes:
        frames: number of frames.
        mean: (B, 1, k).
        covariance: (B, k, k), biased.
    """

    frames: int
    mean: Tensor
    covariance: Tensor

    def joined(self, other: Moments) -> Moments:
        """Statistics of both parts together."""
        frames = self.frames + other.frames
        share = other.frames / frames
        apart = other.mean - self.mean
        covariance = (1 - share) * self.covariance + share * other.covariance
        spread = share * (1 - share) * apart.transpose(1, 2) @ apart
        return Moments(frames, self.mean + share * apart, covariance + spread)


def moments(windows: Tensor) -> Moments:
    """Mean and covariance over time of (B, T, k) inputs."""
    mean = windows.mean(1, keepdim=True, dtype=torch.float64)  # (B, 1, k)
    scatter = torch.stack([_scatter(piece, mean) for piece in windows.split(MOST_WINDOWS, 1)]).sum(0)
    return Moments(windows.size(1), mean, scatter / windows.size(1))


def group_norm_of_linear(
    windows: Tensor, kernel: Tensor, bias: Optional[Tensor], weight: Tensor, shift: Tensor, eps: float
) -> Tuple[Tensor, Tensor]:
    """GroupNorm with one group per channel after a linear map, as a factor and a shift of that map.

    Args:
        windows: (B, T, k) inputs, without padding frames.
        kernel, bias, weight, shift, eps: see :func:`group_norm_by_moments`.

    Returns:
        factor (B, 1, C) of the kernel, and shift (B, 1, C), float32 (float64 for float64 weights).
    """
    return group_norm_by_moments(moments(windows), kernel, bias, weight, shift, eps)


def group_norm_by_moments(
    inputs: Moments, kernel: Tensor, bias: Optional[Tensor], weight: Tensor, shift: Tensor, eps: float
) -> Tuple[Tensor, Tensor]:
    """:func:`group_norm_of_linear` from statistics of the inputs.

    Mean and variance over time of ``inputs @ kernel + bias`` follow from the mean and covariance of the few inputs, so
    the normalisation needs no pass over the outputs. Statistics are float64, because their differences cancel.

    Args:
        inputs: statistics of the (B, T, k) inputs.
        kernel: (k, C), the linear map's.
        bias: (C,), the linear map's, or None.
        weight, shift: (C,), the normalisation's.
        eps: added to the variance.

    Returns:
        factor (B, 1, C) of the kernel, and shift (B, 1, C), float32 (float64 for float64 weights).
    """
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    kernel = kernel.double()
    variance = (kernel * (inputs.covariance @ kernel)).sum(1, keepdim=True)  # (B, 1, C)
    factor = weight.double() * torch.rsqrt(variance + eps)
    mean = inputs.mean @ kernel
    if bias is not None:  # the normalisation subtracts it again
        mean = mean + bias.double() - bias.double()
    return factor.to(dtype), (shift.double() - mean * factor).to(dtype)


def _scatter(windows: Tensor, mean: Tensor) -> Tensor:
    """(B, k, k) sums of products of the centred inputs."""
    centred = windows.double() - mean
    return centred.transpose(1, 2) @ centred


def layer_norm_with_zeros(x: Tensor, full_width: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises over ``full_width`` features, all of which are zero except the given ones.

    Equals padding the last dimension with zeros up to ``full_width``, normalising, and removing the padding, so that a
    shrunk model computes exactly what the gated one computed with the removed channels at zero.

    Args:
        x: (..., C) remaining features, C <= full_width.
        full_width: number of features before pruning.
        weight, bias: (C,) scale and shift.
        eps: added to the variance.

    Returns:
        (..., C) normalised features, with the dtype of ``x``.
    """
    width = x.size(-1)
    if width == full_width:
        return F.layer_norm(x, (width,), weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    mean = y.sum(-1, keepdim=True) / full_width
    centred = y - mean
    variance = (centred.square().sum(-1, keepdim=True) + (full_width - width) * mean.square()) / full_width
    return (centred * torch.rsqrt(variance + eps) * weight.to(wide) + bias.to(wide)).to(x.dtype)


class ChannelLayerNorm(nn.Module):
    """Layer norm over the last dimension with statistics over the width before pruning.

    Args:
        width: remaining features.
        full_width: features before pruning, over which statistics run (missing ones count as zeros).
    """

    def __init__(self, width: int, full_width: int) -> None:
        super().__init__()
        self.full_width = full_width
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, units: Optional[Units] = None) -> Tensor:
        """Args:
            x: (..., C) features.
            units: the channels and their gates; None: all, without gates. A closed channel counts as zero in the
                statistics and gives zero, so it adds nothing and gets no gradient.

        Returns:
            (..., C) normalised features.
        """
        if units is None:
            return layer_norm_with_zeros(x, self.full_width, self.weight, self.bias)
        is_open = (units.gate > 0).to(x.dtype)
        weight, bias = take(self.weight, 0, units.indices), take(self.bias, 0, units.indices)
        return layer_norm_with_zeros(x * is_open, self.full_width, weight, bias) * is_open

    def extra_repr(self) -> str:
        """Widths, for ``print(module)``."""
        return f"{self.weight.numel()} of {self.full_width}"
