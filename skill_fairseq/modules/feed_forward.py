"""Position-wise feed-forward network over the units that are left."""

from __future__ import annotations

from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.activated_conv import activated_conv
from skill_fairseq.modules.hard_concrete import HardConcrete
from skill_fairseq.modules.output_bias import OutputBias
from skill_fairseq.modules.plain import use_plain
from skill_fairseq.modules.slicing import gated_output, take


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
        self.activation = activation
        self.dropout = nn.Dropout(activation_dropout)
        self.gate = HardConcrete(width) if gate_units and width else None
        if self.gate is not None:
            self.gate.multiple = 16
        self.output_gate = HardConcrete(1) if gate_output else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if use_plain():
            y = x
            if self.width:
                y = self.dropout(self._activate(self.fc1(x)))
                if self.gate is not None:
                    y = y * self.gate().to(y.dtype)
            y = self.fc2(y)
            return y if self.output_gate is None else y * self.output_gate().to(y.dtype)
        if not self.width:
            return gated_output(self, self.output_gate, [x], lambda: self.fc2(x))
        return gated_output(self, self.output_gate, [x], lambda: self._open_units(x))

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.activation == "gelu" else F.relu(x)

    def _open_units(self, x: Tensor) -> Tensor:
        """Only the units whose gates are open."""
        assert isinstance(self.fc2, nn.Linear)
        weight = self.fc2.weight
        index = None
        if self.gate is not None:
            index, gate, _ = self.gate.units()
            weight = take(weight, 1, index) * gate.to(weight.dtype)
        x = F.linear(x, take(self.fc1.weight, 0, index), take(self.fc1.bias, 0, index))
        if self.training and self.dropout.p or not torch.is_grad_enabled():
            return F.linear(self.dropout(self._activate(x)), weight, self.fc2.bias)
        y = activated_conv(x.flatten(0, 1), weight.t().unsqueeze(0), self.fc2.bias, 1, self.activation)
        return y.unflatten(0, x.shape[:2])
