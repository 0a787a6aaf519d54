"""Adapters: small networks beside the feed-forward networks, for a task that is learned beside distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("relu", "elu")
NOISE = (0.1, 0.5)
"""Least and largest standard deviation of the noise, as shares of the mean activation."""


class Adapter(nn.Module):
    """Linear, activation, linear, as in OS-KDFT's repository (arXiv:2305.17394). In training normal noise is added to
    the activations, whose standard deviation is drawn again each time: U(0.1, 0.5) times their mean magnitude.

    Args:
        embed_dim: D.
        width: features in between.
        activation: "relu" (its HuBERT student) or "elu" (its WavLM student).
    """

    def __init__(self, embed_dim: int, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, width)
        self.up = nn.Linear(width, embed_dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) input of the feed-forward network to (B, T, D), what is added to its output."""
        y = self.down(x)
        y = F.relu(y) if self.activation == "relu" else F.elu(y)
        if self.training:
            low, high = NOISE
            share = low + (high - low) * torch.rand((), device=y.device)
            y = y + (share * y.detach().abs().mean()).to(y.dtype) * torch.randn_like(y)
        return self.up(y)
