"""Taking units out of weights, such that gradients go back to where the weights came from."""

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
    """``index_select`` for indices that do not repeat: its gradient is copied, not added up, which is far faster."""

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
    """The entries ``index`` of a dimension; what is not taken gets gradient 0.

    Args:
        source: any shape.
        dim: the dimension to take from.
        index: (k,) integers without repetition; None: everything.

    Returns:
        ``source`` with ``k`` entries in that dimension.
    """
    return source if index is None else _Take.apply(source, dim, index)


class StandIn(nn.Module):
    """A module in the place of a linear layer, which may have gates of its own.

    Attributes:
        outputs: its parameters whose first dimension are the outputs.
        inputs: those whose second dimension are the inputs.
    """

    outputs: Sequence[str] = ("weight", "bias")
    inputs: Sequence[str] = ("weight",)

    def forward(self, x: Tensor, draw: Optional[Draw] = None) -> Tensor:
        """(..., in) to (..., out), under the gates of this forward; None where there are none."""
        raise NotImplementedError


def linear(layer: nn.Module, x: Tensor, outputs: Optional[Tensor] = None, draw: Optional[Draw] = None) -> Tensor:
    """A linear layer; where only some outputs are wanted, those rows of its weight.

    Without ``outputs`` the module itself is called: it may be a quantised one, or an adapter around the original.
    """
    if isinstance(layer, StandIn):
        return layer(x, draw)  # type: ignore[no-any-return]
    if outputs is None:
        return whole_linear(layer, x)
    return F.linear(x, take(layer.weight, 0, outputs), take(layer.bias, 0, outputs))  # type: ignore[arg-type]


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` is all there is to a linear layer: not where a tool has put another in its place."""
    return type(layer) is nn.Linear


def computed_units(units: Optional[Units], number: int, *layers: nn.Module) -> Optional[Units]:
    """The units to compute: all ``number`` of them where they cannot be sliced out of one of the layers."""
    return units if all(has_plain_weight(layer) for layer in layers) else all_units(units, number)


def all_units(units: Optional[Units], number: int) -> Optional[Units]:
    """All ``number`` units, closed ones with gate 0."""
    if units is None or units.indices is None:
        return units
    return Units(None, units.gate.new_zeros(number).index_copy(0, units.indices, units.gate), units.any_open)


class _Nothing(torch.autograd.Function):
    """Zeros in the shape of the first argument, whose gradient is 0 for all of them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.likes = [(x.shape, x.dtype, x.device) for x in inputs]  # not the inputs, which may be large
        return torch.zeros_like(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)


def gated_output(
    sublayer: nn.Module, units: Optional[Units], inputs: Sequence[Optional[Tensor]], compute: Callable[[], Tensor]
) -> Tensor:
    """The output of a whole sublayer times its gate; it is not computed where the gate is closed.

    Args:
        sublayer: the module whose parameters get gradient 0 in that case.
        units: the draw of its gate, or None without one.
        inputs: of the sublayer, which get gradient 0 too; the first, (B, T, D), has the shape of its output.
        compute: makes its output (B, T, D).
    """
    if units is None:
        return compute()
    if not units.any_open:
        return _Nothing.apply(*(x for x in inputs if x is not None), *sublayer.parameters())
    y = compute()
    return y * units.gate.to(y.dtype)
