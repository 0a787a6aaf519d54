"""Heads: they map states of the student's layers to the teacher's width and frame rate."""

from collections.abc import Sequence
from typing import Callable, Dict, List

import torch.nn.functional as F
from torch import Tensor, nn


class LayerHeads(nn.ModuleList):
    """One head per pair: N states (B, T, D_S) to N predictions (B, T, D_T)."""

    def forward(self, states: Sequence[Tensor]) -> List[Tensor]:
        """Each state through its head."""
        return [head(state) for head, state in zip(self, states)]


class UpsampleLinear(nn.Module):
    """FitHuBERT's head: a transposed convolution up to the teacher's frame rate, then a linear map to its width.

    Args:
        student, teacher: widths D_S and D_T.
        rate: output frames per input frame.
    """

    def __init__(self, student: int, teacher: int, rate: int) -> None:
        super().__init__()
        self.upsampler = nn.ConvTranspose1d(student, student, rate, stride=rate)
        self.linear = nn.Linear(student, teacher)

    def forward(self, state: Tensor) -> Tensor:
        """(B, T, D_S) to (B, rate T, D_T)."""
        return self.linear(self.upsampler(state.transpose(1, 2)).transpose(1, 2))


class PredictionHeads(nn.Module):
    """DistilHuBERT's heads: prediction n is ``W_n gelu(V h)_n + b_n``, where (V h)_n is the n-th block of D_S features
    of one linear map of h.

    All weights use torch's default initialisation U(+-1/sqrt(D_S)), as in its code.

    Args:
        student, teacher: widths D_S and D_T.
        count: predictions N.
    """

    def __init__(self, student: int, teacher: int, count: int) -> None:
        super().__init__()
        self.shared = nn.Linear(student, student * count)
        self.heads = nn.ModuleList(nn.Linear(student, teacher) for _ in range(count))

    def forward(self, states: Sequence[Tensor]) -> List[Tensor]:
        """``states`` holds the same (B, T, D_S) tensor N times; N predictions (B, T, D_T)."""
        parts = F.gelu(self.shared(states[0])).chunk(len(self.heads), dim=-1)
        return [head(part) for head, part in zip(self.heads, parts)]


HEADS: Dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "identity": lambda student, teacher, count, rate: LayerHeads(nn.Identity() for _ in range(count)),
    "linear": lambda student, teacher, count, rate: LayerHeads(nn.Linear(student, teacher) for _ in range(count)),
    "prediction": lambda student, teacher, count, rate: PredictionHeads(student, teacher, count),
    "upsample_linear": lambda student, teacher, count, rate: LayerHeads(
        UpsampleLinear(student, teacher, rate) for _ in range(count)
    ),
}
"""By name: a function (D_S, D_T, N, rate) to a module that turns the student's N states into N predictions."""
