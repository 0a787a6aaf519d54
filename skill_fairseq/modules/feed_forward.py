"""Position-wise feed-forward network over the units that are left."""

from __future__ import annotations

from typing import Callable, Union

import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.hard_concrete import HardConcrete
from skill_fairseq.modules.output_bias import OutputBias


class FeedForward(nn.Module):
    """Linear, activation, gates, linear; no unit left means its output bias alone.

    Args:
        embed_dim: D.
        width: units that are left.
        activation: "gelu" or "relu".
        activation_dropout: dropout probability after the activation.
        gate_units: put a hard-concrete gate on every unit.
        gate_output: put one hard-concrete gate on the whole sublayer.
    """

    def __init__(
        self,
        embed_dim: int,
        width: int,
        activation: str = "gelu",
        activation_dropout: float = 0.0,
        gate_units: bool = False,
        gate_output: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.fc2: Union[nn.Linear, OutputBias]
        if width:
            self.fc1 = nn.Linear(embed_dim, width)
        self.fc2 = nn.Linear(width, embed_dim) if width else OutputBias(embed_dim)
        self.activation: Callable[[Tensor], Tensor] = F.gelu if activation == "gelu" else F.relu
        self.dropout = nn.Dropout(activation_dropout)
        self.gate = HardConcrete(width) if gate_units and width else None
        self.output_gate = HardConcrete(1) if gate_output else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.width:
            y = self.dropout(self.activation(self.fc1(x)))
            if self.gate is not None:
                y = y * self.gate().to(y.dtype)
            y = self.fc2(y)
        else:
            y = self.fc2(x)
        return y if self.output_gate is None else y * self.output_gate().to(y.dtype)
