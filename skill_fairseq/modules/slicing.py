"""Slices units out of weights, with gradients for the full weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.kernels import linear as whole_linear

if TYPE_CHECKING:
    from skill_fairseq.modules.gate_bank import Draw


class _Take(torch.autograd.Function):
    """``index_select`` for unique indices: its gradient is copied instead of summed, which is much faster."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.shape = dim, source.shape
        return source.index_select(dim, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(ctx.dim, index, grad), None, None


def take(source: Tensor, dim: int, index: Optional[Tensor]) -> Tensor:
    """Selects the entries ``index`` of a dimension; other entries get gradient 0.

    Args:
        source: any shape.
        dim: the dimension.
        index: (k,) integers without repetition; None: everything.

    Returns:
        ``source`` with ``k`` entries in that dimension.
    """
    return source if index is None else _Take.apply(source, dim, index)


class StandIn(nn.Module):
    """A module that replaces a linear layer, and may have its own gates.

    Attributes:
        outputs: its parameters whose first dimension is the outputs.
        inputs: those whose second dimension is the inputs.
    """

    outputs: Sequence[str] = ("weight", "bias")
    inputs: Sequence[str] = ("weight",)

    def forward(self, x: Tensor, draw: Optional[Draw] = None) -> Tensor:
        """(..., in) to (..., out), with the gates of this forward, or None."""
        raise NotImplementedError


def linear(layer: nn.Module, x: Tensor, outputs: Optional[Tensor] = None, draw: Optional[Draw] = None) -> Tensor:
    """Applies a linear layer, or only the rows of its weight for some outputs.

    Without ``outputs`` it calls the module itself, which may be quantised or wrapped by an adapter.
    """
    if isinstance(layer, StandIn):
        return layer(x, draw)  # type: ignore[no-any-return]
    if outputs is None:
        return whole_linear(layer, x)
    return F.linear(x, take(layer.weight, 0, outputs), take(layer.bias, 0, outputs))  # type: ignore[arg-type]


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` fully describes a linear layer, not one that another tool has replaced."""
    return type(layer) is nn.Linear


def computed_units(units: Optional[Units], number: int, *layers: nn.Module) -> Optional[Units]:
    """The units to compute: all ``number`` of them if one of the layers cannot be sliced."""
    return units if all(has_plain_weight(layer) for layer in layers) else all_units(units, number)


def all_units(units: Optional[Units], number: int) -> Optional[Units]:
    """All ``number`` units, closed ones with gate 0."""
    if units is None or units.indices is None:
        return units
    return Units(None, units.gate.new_zeros(number).index_copy(0, units.indices, units.gate), units.any_open)


class _Nothing(torch.autograd.Function):
    """Zeros with the shape of the first argument and a gradient of 0 for all arguments."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.likes = [(x.shape, x.dtype, x.device) for x in inputs]  # not the inputs themselves, which may be large
        return torch.zeros_like(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)


def gated_output(
    sublayer: nn.Module, units: Optional[Units], inputs: Sequence[Optional[Tensor]], compute: Callable[[], Tensor]
) -> Tensor:
    """The output of a whole sublayer times its gate; not computed if the gate is closed.

    Args:
        sublayer: the module, whose parameters get gradient 0 in that case.
        units: the draw of its gate, or None.
        inputs: the sublayer's inputs, which also get gradient 0; the first, (B, T, D), has the shape of its output.
        compute: computes its output (B, T, D).
    """
    if units is None:
        return compute()
    if not units.any_open:
        return _Nothing.apply(*(x for x in inputs if x is not None), *sublayer.parameters())
    y = compute()
    return y * units.gate.to(y.dtype)
