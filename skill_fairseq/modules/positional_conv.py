"""Convolutional positional embedding of wav2vec 2.0 with weight normalisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionalConv(nn.Module):
    """Grouped convolution over time, weight-normalised along the kernel axis, then GELU.

    The weight norm is kept as two plain parameters, ``weight_g`` (1, 1, K) and ``weight_v`` (D, D / groups, K), the
    names of published checkpoints, so that it reads the same in every torch version. It is never pruned.

    Args:
        embed_dim: D, features.
        kernel_size: K, frames.
        groups: convolution groups.
    """

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(embed_dim, embed_dim // groups, kernel_size))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        nn.init.normal_(self.weight_v, std=math.sqrt(4 / (kernel_size * embed_dim)))
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    def weight(self) -> Tensor:
        """The effective kernel, (D, D / groups, K)."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) frames to (B, T, D) position embeddings."""
        kernel_size = self.weight_v.size(-1)
        y = F.conv1d(x.transpose(1, 2), self.weight(), self.bias, padding=kernel_size // 2, groups=self.groups)
        if kernel_size % 2 == 0:  # an even kernel makes one frame too many
            y = y[..., :-1]
        return F.gelu(y).transpose(1, 2)
