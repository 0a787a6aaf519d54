"""softmax(q k^T / sqrt(d) + gated relative position bias) v, without a (T, T) matrix that outlives its use."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 1 << 19
"""Scores computed at a time on a CPU: 2 MB, about a core's cache."""
BLOCK_QUERIES = 64


def expand_offsets(by_offset: Tensor) -> Tensor:
    """Position bias of every pair: (h, 2T - 1) by offset to (h, T, T), a view; the *keys count backwards*.

    Args:
        by_offset: bias of the offsets key - query = T - 1 down to 1 - T.

    Returns:
        [h, i, j] is the bias of query i for key T - 1 - j. Of keys in order no strided view exists: hence.
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
        padding_mask: (B, T) bool, True where a key is hidden; None: nothing is.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, h, d).
    """
    if factor is not None:
        k, v = k.flip(2), v.flip(2)
        padding_mask = None if padding_mask is None else padding_mask.flip(1)
    if q.device.type == "cpu" and torch.is_grad_enabled() or not hasattr(F, "scaled_dot_product_attention"):
        # torch's CPU kernels have no gradient of the bias and no dropout: they would fall back to whole matrices.
        return _BlockwiseAttention.apply(q, k, v, factor, by_offset, padding_mask, dropout)
    bias = None if factor is None or by_offset is None else factor.to(q.dtype) * expand_offsets(by_offset.to(q.dtype))
    if padding_mask is not None:
        hidden = padding_mask[:, None, None, :]
        zero = torch.zeros_like(hidden, dtype=q.dtype) if bias is None else bias
        bias = zero.masked_fill(hidden, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)


class _Block(NamedTuple):
    """Some heads of one utterance and some of its queries."""

    batch: int
    heads: slice
    queries: slice


class _BlockwiseAttention(torch.autograd.Function):
    """Goes through the score matrix block by block, forward and, computing it again, backward.

    Kept for the backward pass are the inputs and, with dropout, which weights were dropped: (B, h, T, T) bool.
    Keys and values come in the order of ``by_offset``. All is computed in float32 (float64 for float64 input).
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
        heads, frames = q.shape[1:3]
        kept = None
        if dropout:
            kept = torch.empty(*q.shape[:3], frames, dtype=torch.bool, device=q.device).bernoulli_(1 - dropout)
        ctx.dropout = dropout
        ctx.save_for_backward(q, k, v, factor, by_offset, padding_mask, kept)
        out = q.new_empty(q.size(0), frames, heads, q.size(3))
        for block in _blocks(q):
            weights = _weights(block, q, k, factor, by_offset, padding_mask)
            if kept is not None:
                weights.mul_(kept[block.batch, block.heads, block.queries]).div_(1 - dropout)
            values = torch.bmm(weights, _wide(v[block.batch, block.heads]))
            out[block.batch, block.queries, block.heads] = values.transpose(0, 1).to(out.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        q, k, v, factor, by_offset, padding_mask, kept = ctx.saved_tensors
        wide = _wide(q[:0]).dtype
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        grad_factor = grad_by_offset = None
        if factor is not None:
            grad_factor = torch.empty(factor.shape, dtype=wide, device=q.device)
            grad_by_offset = torch.zeros(by_offset.shape, dtype=wide, device=q.device)
        scale = q.size(3) ** -0.5
        for block in _blocks(q):
            b, h, t = block
            weights = _weights(block, q, k, factor, by_offset, padding_mask)
            out = _wide(grad[b, t, h]).transpose(0, 1)  # (h, t, d)
            grad_weights = torch.bmm(out, _wide(v[b, h]).transpose(1, 2))
            dropped = weights
            if kept is not None:
                keep = kept[b, h, t].to(wide).div_(1 - ctx.dropout)
                dropped = weights * keep
                grad_weights.mul_(keep)
            grad_v[b, h] += torch.bmm(dropped.transpose(1, 2), out)
            scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, wide)
            grad_q[b, h, t] = torch.bmm(scores, _wide(k[b, h])).mul_(scale)
            grad_k[b, h] += torch.bmm(scores.transpose(1, 2), _wide(q[b, h, t])).mul_(scale)
            if factor is not None:
                bias = expand_offsets(by_offset)[h, t]
                grad_factor[b, h, t] = (scores * bias).sum(-1, keepdim=True)
                scores.mul_(factor[b, h, t])
                _add_by_offset(grad_by_offset[h], scores, t)
        grads = tuple(g.to(x.dtype) for g, x in zip((grad_q, grad_k, grad_v), (q, k, v)))
        if factor is not None:
            return (*grads, grad_factor.to(factor.dtype), grad_by_offset.to(by_offset.dtype), None, None)
        return (*grads, None, None, None, None)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _blocks(q: Tensor) -> Iterator[_Block]:
    batch, heads, frames = q.shape[:3]
    num_queries = min(BLOCK_QUERIES, frames)
    num_heads = max(1, min(heads, BLOCK_SCORES // (num_queries * frames)))
    for b in range(batch):
        for h in range(0, heads, num_heads):
            for t in range(0, frames, num_queries):
                yield _Block(b, slice(h, h + num_heads), slice(t, t + num_queries))


def _weights(
    block: _Block,
    q: Tensor,
    k: Tensor,
    factor: Optional[Tensor],
    by_offset: Optional[Tensor],
    padding_mask: Optional[Tensor],
) -> Tensor:
    """(h, t, T) attention weights of a block."""
    b, h, t = block
    scores = torch.bmm(_wide(q[b, h, t]) * q.size(3) ** -0.5, _wide(k[b, h]).transpose(1, 2))
    if factor is not None and by_offset is not None:
        scores.addcmul_(factor[b, h, t].to(scores.dtype), expand_offsets(by_offset)[h, t].to(scores.dtype))
    if padding_mask is not None:
        scores.masked_fill_(padding_mask[b], float("-inf"))
    return scores.softmax(-1)


def _add_by_offset(total: Tensor, scores: Tensor, queries: slice) -> None:
    """Adds up what belongs to one offset: (h, t, T) of some queries, keys backwards, into (h, 2T - 1)."""
    heads, num_queries, frames = scores.shape
    width = frames + num_queries - 1
    # Entry (i, j) goes to column i + j of a wider matrix, which is the same place plus i places a row.
    skewed = scores.new_zeros(heads, num_queries, width)
    skewed.as_strided(scores.shape, (num_queries * width, width + 1, 1)).copy_(scores)
    total[:, queries.start : queries.start + width] += skewed.sum(1)
