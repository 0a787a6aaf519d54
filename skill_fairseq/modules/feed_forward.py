"""Position-wise feed-forward network over the remaining units."""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.activated_conv import activated_conv
from skill_fairseq.modules.gate_bank import Draw, HardConcrete
from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.output_bias import OutputBias
from skill_fairseq.modules.slicing import computed_units, gated_output, has_plain_weight, linear, take


class FeedForward(nn.Module):
    """Linear, activation, gates, linear; without units it returns its output bias.

    Args:
        embed_dim: D.
        width: remaining units.
        activation: "gelu" or "relu".
        activation_dropout: dropout probability after the activation.

    Attributes:
        gate: gate of the units, or None.
        output_gate: gate of the whole sublayer, or None.
    """

    gate: Optional[HardConcrete] = None
    output_gate: Optional[HardConcrete] = None

    def __init__(
        self,
        embed_dim: int,
        width: int,
        activation: str = "gelu",
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.fc2: Union[nn.Linear, OutputBias]
        if width:
            self.fc1 = nn.Linear(embed_dim, width)
        self.fc2 = nn.Linear(width, embed_dim) if width else OutputBias(embed_dim)
        self.activation = activation
        self.dropout = nn.Dropout(activation_dropout)

    def forward(self, x: Tensor, draw: Optional[Draw] = None) -> Tensor:
        """Args:
            x: (B, T, D) frames.
            draw: the gates of this forward, or None.

        Returns:
            (B, T, D).
        """
        units, output = (None, None) if draw is None else (draw.of(self.gate), draw.of(self.output_gate))
        if not self.width:
            return gated_output(self, output, [x], lambda: self.fc2(x))
        return gated_output(self, output, [x], lambda: self._open_units(x, units, draw))

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.activation == "gelu" else F.relu(x)

    def _open_units(self, x: Tensor, units: Optional[Units], draw: Optional[Draw]) -> Tensor:
        """Computes only units with open gates."""
        units = computed_units(units, self.width, self.fc1, self.fc2)
        x = linear(self.fc1, x, None if units is None else units.indices, draw)
        if not has_plain_weight(self.fc2):
            y = self.dropout(self._activate(x))
            return linear(self.fc2, y if units is None else y * units.gate.to(y.dtype), draw=draw)
        weight: Tensor = self.fc2.weight  # type: ignore[assignment]
        if units is not None:
            weight = take(weight, 1, units.indices) * units.gate.to(weight.dtype)
        if self.training and self.dropout.p or not torch.is_grad_enabled():
            y = self.dropout(self._activate(x))
            return F.linear(y, weight, self.fc2.bias) if units is not None else linear(self.fc2, y)
        y = activated_conv(x.flatten(0, 1), weight.t().unsqueeze(0), self.fc2.bias, 1, self.activation)
        return y.unflatten(0, x.shape[:2])
