"""Low-rank linear maps: W = up diag(z) down, with a gate z on every component while pruning.

Sainath et al. 2013 ("Low-rank matrix factorization for deep neural network training"); gates on the components as in
Wang et al. 2020 (arXiv:1910.04732).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.output_bias import OutputBias
from skill_fairseq.modules.slicing import StandIn, computed_units, take

if TYPE_CHECKING:
    from skill_fairseq.modules.gate_bank import Draw, HardConcrete

INIT_STD = 0.02
"""Standard deviation of random weights of the product: BERT's, as for linear maps."""


def is_thin(rank: int, outputs: int, inputs: int) -> bool:
    """Whether two matrices of this rank have fewer weights than one matrix: ``rank (outputs + inputs) < outputs
    inputs``."""
    return rank * (outputs + inputs) < outputs * inputs


def factorise(weight: Tensor, rank: int) -> Tuple[Tensor, Tensor]:
    """The closest matrix of a rank in the Frobenius norm, as a product: a truncated SVD (Eckart & Young 1936).

    Args:
        weight: (out, in).
        rank: r, at most min(out, in).

    Returns:
        (out, r) and (r, in) with its dtype, components by falling singular value, whose root is in each factor. The
        free sign of a component makes the largest entry of the first factor positive, so that all processes of a run
        start with the same factors.
    """
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:rank]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign() if len(u) else u.sum(0, keepdim=True)
    return (u * sign * s).to(weight.dtype), (v * sign.T * s[:, None]).to(weight.dtype)


class LowRankLinear(StandIn):
    """Replaces a linear layer by ``x -> up diag(z) down x + bias``; without gates z is 1, at rank 0 only the bias is
    left.

    Args:
        inputs, outputs: features of the linear layer.
        rank: number of components.

    Attributes:
        gate: gate of the components, or None.
    """

    outputs = ("up.weight", "up.bias")
    inputs = ("down.weight",)
    gate: Optional[HardConcrete] = None

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.up: Union[nn.Linear, OutputBias]
        if not rank:
            self.up = OutputBias(outputs)
            return
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=(INIT_STD / rank**0.5) ** 0.5)
        nn.init.zeros_(self.up.bias)

    @property
    def weight(self) -> Tensor:
        """(out, in), the product of the two matrices."""
        if not self.rank:
            return self.up.bias.new_zeros(self.out_features, self.in_features)
        return self.up.weight @ self.down.weight  # type: ignore[operator, no-any-return]

    def forward(self, x: Tensor, draw: Optional[Draw] = None) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.rank:
            return self.up.bias.expand(*x.shape[:-1], -1)
        units = None if draw is None else computed_units(draw.of(self.gate), self.rank, self.down, self.up)
        if units is None:
            return self.up(self.down(x))  # type: ignore[no-any-return]
        gate = units.gate.to(x.dtype)
        if units.indices is None:
            return self.up(self.down(x) * gate)  # type: ignore[no-any-return]
        up = take(self.up.weight, 1, units.indices) * gate  # type: ignore[arg-type]
        down = take(self.down.weight, 0, units.indices)
        return F.linear(F.linear(x, down), up, self.up.bias)  # type: ignore[arg-type]
