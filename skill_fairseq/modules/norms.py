"""Layer normalisation whose statistics run over the original width after channels were cut out."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_with_zeros(x: Tensor, full_width: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises over ``full_width`` features of which all but the given ones are zero.

    Equal to padding the last dimension with zeros up to ``full_width``, normalising, and cutting the padding off;
    so a model shrinks to exactly what it computed with the cut channels gated to zero.

    Args:
        x: (..., C) features that are left, C <= full_width.
        full_width: number of features before pruning.
        weight, bias: (C,) scale and shift.
        eps: added to the variance.

    Returns:
        (..., C) normalised features, in the type of ``x``.
    """
    width = x.size(-1)
    if width == full_width:
        return F.layer_norm(x, (width,), weight, bias, eps)
    y = x.float()
    mean = y.sum(-1, keepdim=True) / full_width
    centred = y - mean
    variance = (centred.square().sum(-1, keepdim=True) + (full_width - width) * mean.square()) / full_width
    return (centred * torch.rsqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)


class ChannelLayerNorm(nn.Module):
    """Layer norm over the last dimension that knows the width before pruning.

    Args:
        width: features that are left.
        full_width: features before pruning, which the statistics run over (the missing ones count as zeros).
    """

    def __init__(self, width: int, full_width: int) -> None:
        super().__init__()
        self.full_width = full_width
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, present: Optional[Tensor] = None) -> Tensor:
        """Args:
            x: (..., width) features.
            present: (width,) 1 where a channel's gate is open, 0 where it is closed; a closed channel counts as
                zero in the statistics and leaves as zero, so that it adds nothing and gets no gradient.

        Returns:
            (..., width) normalised features.
        """
        if present is None:
            return layer_norm_with_zeros(x, self.full_width, self.weight, self.bias)
        return layer_norm_with_zeros(x * present, self.full_width, self.weight, self.bias) * present

    def extra_repr(self) -> str:
        """Widths, for ``print(module)``."""
        return f"{self.weight.numel()} of {self.full_width}"
