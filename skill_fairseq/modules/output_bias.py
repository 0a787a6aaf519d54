"""The rest of a sublayer without units."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OutputBias(nn.Module):
    """The output bias of a projection without inputs, for every frame.

    A sublayer without units still adds its bias; dropping it would change the function.

    Args:
        embed_dim: D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the bias expanded to (B, T, D)."""
        return self.bias.expand_as(x)
