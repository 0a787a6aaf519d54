"""Activation and strided convolution in one step, computed as matrix products over frames."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products on this tensor's device: autocast's if enabled, else the tensor's own."""
    kind = x.device.type
    if x.dtype == torch.float64:  # autocast does not change it
        return x.dtype
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind == "cpu":  # torch < 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else x.dtype


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.gelu(x) if activation == "gelu" else F.relu(x)


def _activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    return grad * (x > 0)


class _ActivatedConv(torch.autograd.Function):
    """Keeps only the input for the backward pass, which recomputes the cheap activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Optional[Tensor], stride: int, activation: str) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.stride, ctx.activation, ctx.has_bias = stride, activation, bias is not None
        blocks = _activate(x, activation).view(x.size(0) // stride, -1)
        out = x.new_empty(blocks.size(0), kernel.size(2))
        for shift, rows in enumerate(_by_shift(kernel, stride)):
            used = blocks[shift:, : rows.size(0)]
            if shift:
                out[: len(used)].addmm_(used, rows)
            elif bias is None:
                torch.mm(used, rows, out=out)
            else:
                torch.addmm(bias, used, rows, out=out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _ActivatedConv._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, kernel = ctx.saved_tensors
        stride, activation = ctx.stride, ctx.activation
        grad = grad.contiguous()
        grad_x = grad_kernel = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            by_block = grad_x.view(x.size(0) // stride, -1)
            for shift, rows in enumerate(_by_shift(kernel, stride)):
                if shift:
                    by_block[shift:, : rows.size(0)].addmm_(grad[: len(grad) - shift], rows.t())
                else:
                    by_block[:, : rows.size(0)] = grad @ rows.t()
                    by_block[:, rows.size(0) :] = 0
            grad_x = _activation_gradient(grad_x, x, activation)
        if ctx.needs_input_grad[1]:
            blocks = _activate(x, activation).view(x.size(0) // stride, -1)
            grad_kernel = torch.empty_like(kernel)
            for shift, rows in enumerate(_by_shift(grad_kernel, stride)):
                torch.mm(blocks[shift:, : rows.size(0)].t(), grad[: len(grad) - shift], out=rows)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_kernel, grad_bias, None, None


def _by_shift(kernel: Tensor, stride: int) -> Tuple[Tensor, ...]:
    """Splits the kernel (k, C, O) into pieces for blocks of ``stride`` frames: views (<= stride C, O)."""
    return tuple(piece.view(-1, piece.size(2)) if piece.size(0) > 1 else piece[0] for piece in kernel.split(stride))


def activated_conv(
    x: Tensor, kernel: Tensor, bias: Optional[Tensor], stride: int = 1, activation: str = "gelu"
) -> Tensor:
    """``conv1d(activation(x))`` over rows of frames, without padding.

    ``stride`` frames form one row of a matrix, and the convolution is one matrix product per stride of the kernel's
    length, without unfolding or reordering. A linear layer is the case of kernel and stride 1.

    Args:
        x: (N, C) frames before the activation, N a multiple of ``stride``. Utterances of a batch are concatenated.
        kernel: (k, C, O), contiguous or with k = 1.
        bias: (O,) or None.
        stride: frames.
        activation: "gelu" or "relu".

    Returns:
        (N / stride, O): row i covers the frames ``i stride`` to ``i stride + k - 1``. The last ``ceil(k / stride) - 1``
        rows of an utterance reach beyond it and must not be used.
    """
    dtype = compute_dtype(x)
    x, kernel = x.to(dtype).contiguous(), kernel.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _ActivatedConv.apply(x, kernel, bias, stride, activation)
