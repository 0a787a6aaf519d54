"""Adapters: small networks beside the feed-forward networks, for a task that is learned during distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("relu", "elu")
FORMS = ("plain", "residual")
"""Values of ``model.adapter_form``: :class:`Adapter`, :class:`ResidualAdapter`."""
NOISE = (0.1, 0.5)
"""Least and largest standard deviation of the noise, relative to the mean activation."""


class Adapter(nn.Module):
    """Linear, activation, linear, as in OS-KDFT's repository (arXiv:2305.17394). Training adds normal noise to the
    activations, with a random standard deviation each time: U(0.1, 0.5) times their mean magnitude.

    Args:
        embed_dim: D.
        width: hidden features.
        activation: "relu" (its HuBERT student) or "elu" (its WavLM student).
    """

    def __init__(self, embed_dim: int, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, width)
        self.up = nn.Linear(width, embed_dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) input of the feed-forward network to (B, T, D), to add to its output."""
        y = self.down(x)
        y = F.relu(y) if self.activation == "relu" else F.elu(y)
        if self.training:
            low, high = NOISE
            share = low + (high - low) * torch.rand((), device=y.device)
            y = y + (share * y.detach().abs().mean()).to(y.dtype) * torch.randn_like(y)
        return self.up(y)


class ResidualAdapter(nn.Module):
    """x + 0.1 up(relu(down(LayerNorm(x)))), from the first scripts of OS-KDFT (arXiv:2305.17394): with the layer's own
    residual, x is added twice. ``up`` starts at 0; there is no noise.

    Args:
        embed_dim, width: see :class:`Adapter`.
    """

    SCALE = 0.1

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.down = nn.Linear(embed_dim, width)
        self.up = nn.Linear(width, embed_dim)
        self.reset()

    def reset(self) -> None:
        """Sets ``up`` to 0, so that the adapter starts as the identity."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) input of the feed-forward sublayer, before its LayerNorm, to (B, T, D), to add to its output."""
        return x + self.SCALE * self.up(F.relu(self.down(self.norm(x))))


def make_adapter(embed_dim: int, width: int, activation: str, form: str) -> nn.Module:
    """Builds an adapter; only the plain form uses ``activation``."""
    return ResidualAdapter(embed_dim, width) if form == "residual" else Adapter(embed_dim, width, activation)
