"""softmax(q k^T / sqrt(d) + gated relative position bias) v, without keeping (T, T) matrices."""

from __future__ import annotations

from typing import Any, Callable, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 1 << 19
"""Scores per block on a CPU: 2 MB, about a core's cache."""
BLOCK_QUERIES = 64
LONG = 800
"""Frames (16 s) from which inference on a CPU uses blocks. For 12 heads of 64 on one thread of a Xeon with AMX, blocks
take 1.5 times as long as torch's kernel with a whole bias at 1 s, 1.07 at 16 s, 0.86 at 20 s, 0.82 at 60 s."""

Kernel = Callable[
    [Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], float],
    Tensor,
]
"""An attention function with the arguments of :func:`attend`, and keys and values in the order of ``by_offset``."""


def expand_offsets(by_offset: Tensor) -> Tensor:
    """Position bias of every pair: (h, 2T - 1) by offset to (h, T, T), a view in which *keys are reversed*.

    Args:
        by_offset: bias of the offsets key - query = T - 1 down to 1 - T.

    Returns:
        [h, i, j] is the bias of query i for key T - 1 - j. Keys in order would not be a strided view.
    """
    return by_offset.unfold(1, (by_offset.size(1) + 1) // 2, 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor] = None,
    by_offset: Optional[Tensor] = None,
    padding_mask: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with a relative position bias that each query scales.

    Args:
        q, k, v: (B, h, T, d).
        factor: (B, h, T, 1), each query's factor of the bias; None: no bias.
        by_offset: (h, 2T - 1), see :func:`expand_offsets`; None: no bias.
        padding_mask: (B, T) bool, True = masked key, with at least one False per row; None: no masked keys.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, h, d).
    """
    if factor is not None:
        k, v = k.flip(2), v.flip(2)
        padding_mask = None if padding_mask is None else padding_mask.flip(1)
    matrix = factor is not None or padding_mask is not None
    kernel = choose_kernel(q.device.type, q.size(2), matrix, torch.is_grad_enabled())
    return kernel(q, k, v, factor, by_offset, padding_mask, dropout)


def attend_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor] = None,
    by_offset: Optional[Tensor] = None,
    padding_mask: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tuple[Tensor, Tensor]:
    """:func:`attend` that also returns the attention maps.

    Returns:
        (B, T, h, d), and the (B, h, T, T) softmaxes before dropout, keys in order, in at least float32.
    """
    if factor is None:
        return _whole(q, k, v, None, None, padding_mask, dropout)
    padding_mask = None if padding_mask is None else padding_mask.flip(1)
    y, weights = _whole(q, k.flip(2), v.flip(2), factor, by_offset, padding_mask, dropout)
    return y, weights.flip(3)


def choose_kernel(device: str, frames: int, matrix: bool, gradients: bool) -> Kernel:
    """Chooses a kernel that is fast on a device and keeps little memory.

    Args:
        device: the device's type, such as "cpu".
        frames: T.
        matrix: whether there is a bias or a padding mask, which torch's kernel needs as a (B, h, T, T) matrix.
        gradients: whether gradients may be needed.
    """
    fused = hasattr(F, "scaled_dot_product_attention")  # torch >= 2.0
    if device != "cpu":
        return attend_fused if fused else attend_whole
    # torch's CPU kernels lack a gradient of the bias and dropout, and would fall back to whole matrices.
    linear = not matrix and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")  # torch >= 2.2
    if gradients or not fused or frames > LONG and not linear:
        return attend_blockwise
    return attend_fused


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor],
    by_offset: Optional[Tensor],
    padding_mask: Optional[Tensor],
    dropout: float,
) -> Tensor:
    """torch's kernel, for GPUs and for short inputs on CPUs.

    It needs the bias as one (B, h, T, T) matrix of the queries' dtype, and keeps it for the backward pass. For Base (12
    heads, 12 layers) and 156 s of audio in bf16, this is 146 MB per layer and 1.75 GB in total for 10 utterances of
    15.6 s (twice that in float32), and 1.46 GB per layer for one utterance. With ``model.checkpoint_activations`` only
    one layer's is kept.
    """
    bias = _bias(q, factor, by_offset, padding_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)


def attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor],
    by_offset: Optional[Tensor],
    padding_mask: Optional[Tensor],
    dropout: float,
) -> Tensor:
    """Matrix products and a softmax, for GPUs under torch < 2.0; keeps three (B, h, T, T) matrices."""
    return _whole(q, k, v, factor, by_offset, padding_mask, dropout)[0]


def _whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor],
    by_offset: Optional[Tensor],
    padding_mask: Optional[Tensor],
    dropout: float,
) -> Tuple[Tensor, Tensor]:
    """The output (B, T, h, d), and the attention weights (B, h, T, T) before dropout."""
    scores = _wide(q @ k.transpose(2, 3) * q.size(3) ** -0.5)
    bias = _bias(q, factor, by_offset, padding_mask)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return (F.dropout(weights, dropout).to(v.dtype) @ v).transpose(1, 2), weights


def _bias(
    q: Tensor, factor: Optional[Tensor], by_offset: Optional[Tensor], padding_mask: Optional[Tensor]
) -> Optional[Tensor]:
    """The bias of the scores, (B, h, T, T) or, with only a mask, (B, 1, 1, T); None: no bias."""
    bias = None if factor is None or by_offset is None else factor.to(q.dtype) * expand_offsets(by_offset.to(q.dtype))
    if padding_mask is None:
        return bias
    hidden = padding_mask[:, None, None, :]
    zero = torch.zeros_like(hidden, dtype=q.dtype) if bias is None else bias
    return zero.masked_fill(hidden, float("-inf"))


def attend_blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor],
    by_offset: Optional[Tensor],
    padding_mask: Optional[Tensor],
    dropout: float,
) -> Tensor:
    """Computes by blocks, with memory linear in T, for training and long inputs on CPUs."""
    batch, heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if factor is not None and by_offset is not None:
        factor, by_offset = factor.flatten(0, 1), by_offset.repeat(batch, 1)
    if padding_mask is not None:
        padding_mask = padding_mask.repeat_interleave(heads, 0)
    with torch.autocast(q.device.type, enabled=False):
        out = _BlockwiseAttention.apply(q, k, v, factor, by_offset, padding_mask, dropout)
    return out.unflatten(0, (batch, heads)).transpose(1, 2)


class _BlockwiseAttention(torch.autograd.Function):
    """Computes the score matrices by blocks in the forward pass, and again in the backward pass.

    Inputs are those of :func:`attend`, with the pairs of utterance and head as the first dimension. The backward pass
    keeps only them and a seed, from which it regenerates the dropout masks. Computes in float32 (float64 for float64
    input).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        factor: Optional[Tensor],
        by_offset: Optional[Tensor],
        padding_mask: Optional[Tensor],
        dropout: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, factor, by_offset, padding_mask)
        ctx.dropout = _Dropout(dropout, int(torch.randint(1 << 62, ()))) if dropout else None
        masks = None if ctx.dropout is None else ctx.dropout.masks(q.device)
        out = q.new_empty(*q.shape[:2], v.size(2))
        for n, t in _blocks(q):
            weights = _weights(n, t, q, k, factor, by_offset, padding_mask)
            if masks is not None:
                weights.mul_(masks(weights))
            values = torch.bmm(weights, _wide(v[n]))
            out[n, t] = values if ctx.dropout is None else values.mul_(ctx.dropout.scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _BlockwiseAttention._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        q, k, v, factor, by_offset, padding_mask = ctx.saved_tensors
        masks = None if ctx.dropout is None else ctx.dropout.masks(q.device)
        wide = _wide(q[:0]).dtype
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        grad_factor = offsets = None
        if factor is not None:
            grad_factor = torch.empty(factor.shape, dtype=wide, device=q.device)
            offsets = _OffsetSums(by_offset.shape, wide, q.device)
        scale = q.size(2) ** -0.5
        for n, t in _blocks(q):
            weights = _weights(n, t, q, k, factor, by_offset, padding_mask)
            out = _wide(grad[n, t])
            dropped = weights
            if masks is None:
                grad_weights = torch.bmm(out, _wide(v[n]).transpose(1, 2))
            else:
                out = out * ctx.dropout.scale
                kept = masks(weights)
                dropped = weights * kept
                grad_weights = torch.bmm(out, _wide(v[n]).transpose(1, 2)).mul_(kept)
            grad_v[n].baddbmm_(dropped.transpose(1, 2), out)
            scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, wide)
            grad_q[n, t] = torch.bmm(scores, _wide(k[n])).mul_(scale)
            grad_k[n].baddbmm_(scores.transpose(1, 2), _wide(q[n, t]), alpha=scale)
            if offsets is not None and grad_factor is not None:
                grad_factor[n, t] = torch.mul(scores, expand_offsets(by_offset[n])[:, t], out=weights).sum(-1, True)
                offsets.add(scores, factor[n, t], n, t)
        grads = tuple(g.to(x.dtype) for g, x in zip((grad_q, grad_k, grad_v), (q, k, v)))
        if offsets is not None and grad_factor is not None:
            return (*grads, grad_factor.to(factor.dtype), offsets.total.to(by_offset.dtype), None, None)
        return (*grads, None, None, None, None)


class _Dropout(NamedTuple):
    """Repeatable dropout. Probabilities are rounded to 1 / 65536, because 16 random bits decide on each weight."""

    probability: float
    seed: int

    @property
    def threshold(self) -> int:
        return round(self.probability * 65536)

    @property
    def scale(self) -> float:
        """Factor of kept weights."""
        return 65536 / (65536 - self.threshold) if self.threshold < 65536 else 0.0

    def masks(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function that returns the same sequence of masks each time: True for kept entries of its argument."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def mask(like: Tensor) -> Tensor:
            words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=device)
            words.random_(-(1 << 63), None, generator=generator)
            return words.view(torch.int16)[: like.numel()].view(like.shape) >= self.threshold - 32768

        return mask


class _OffsetSums:
    """Sums gradients of scores by offset.

    Args:
        shape: (pairs, 2T - 1) of the result ``total``.
        dtype, device: those of the gradients.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self._skewed = self.total[:0]

    def add(self, scores: Tensor, factor: Tensor, pairs: slice, queries: slice) -> None:
        """Adds (n, t, T) gradients of scores of some queries, keys reversed, times the (n, t, 1) factor of the bias."""
        num_pairs, num_queries, frames = scores.shape
        width = frames + num_queries - 1
        if self._skewed.shape != (num_pairs, num_queries, width):
            self._skewed = scores.new_zeros(num_pairs, num_queries, width)
        # Entry (i, j) goes to column i + j of a wider matrix, which shifts row i by i places. The rest stays 0.
        view = self._skewed.as_strided(scores.shape, (num_queries * width, width + 1, 1))
        torch.mul(scores, factor, out=view)
        self.total[pairs, queries.start : queries.start + width] += self._skewed.sum(1)


def _wide(x: Tensor) -> Tensor:
    """Casts half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _blocks(q: Tensor) -> Iterator[Tuple[slice, slice]]:
    """Slices of pairs of utterance and head, and of queries, to compute together."""
    pairs, frames = q.shape[:2]
    num_queries = min(BLOCK_QUERIES, frames)
    num_pairs = max(1, min(pairs, BLOCK_SCORES // (num_queries * frames)))
    for n in range(0, pairs, num_pairs):
        for t in range(0, frames, num_queries):
            yield slice(n, min(n + num_pairs, pairs)), slice(t, min(t + num_queries, frames))


def _weights(
    n: slice,
    t: slice,
    q: Tensor,
    k: Tensor,
    factor: Optional[Tensor],
    by_offset: Optional[Tensor],
    padding_mask: Optional[Tensor],
) -> Tensor:
    """(n, t, T) attention weights of a block."""
    scores = torch.bmm(_wide(q[n, t]) * q.size(2) ** -0.5, _wide(k[n]).transpose(1, 2))
    if factor is not None and by_offset is not None:
        scores.addcmul_(factor[n, t].to(scores.dtype), expand_offsets(by_offset[n])[:, t].to(scores.dtype))
    if padding_mask is not None:
        # Not -inf: an utterance without frames would give NaN values and gradients.
        scores.masked_fill_(padding_mask[n, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
