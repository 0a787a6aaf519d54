"""Multi-head self-attention with WavLM's gated relative position, over the heads that are left."""

from __future__ import annotations

from typing import List, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.hard_concrete import HardConcrete
from skill_fairseq.modules.output_bias import OutputBias


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v.

    Args:
        q, k, v: (B, H, T, d).
        bias: additive, broadcastable to (B, H, T, T), -inf where a key is hidden; or None.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, d).
    """
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    if bias is not None:
        scores = scores + bias
    return F.dropout(scores.softmax(-1), dropout) @ v


class RelativePositionGate(nn.Module):
    """Gates the position bias by the content of the query frame (Chen et al. 2022, equations 4-6).

    Args:
        head_dim: d, features a head.
        num_heads: heads before pruning; ``grep_a`` keeps one entry for each of them.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        self.grep_linear = nn.Linear(head_dim, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        """Args:
            x: (B, T, D) input of the attention.
            heads: (h,) indices of the heads that are left.

        Returns:
            (B, h, T, 1) factor of the position bias.
        """
        num_heads = self.grep_a.size(1)
        x = x.unflatten(-1, (num_heads, -1))
        if heads.numel() < num_heads:
            x = x[:, :, heads]
        gates = self.grep_linear(x).unflatten(-1, (2, 4)).sum(-1).sigmoid()  # (B, T, h, 2)
        update, reset = gates.transpose(1, 2).unsqueeze(-1).unbind(3)  # (B, h, T, 1) each
        return update * (reset * self.grep_a[:, heads] - 1.0) + 2.0


class SelfAttention(nn.Module):
    """Self-attention over the heads ``heads`` out of ``full_heads``; none left means its output bias alone.

    Args:
        embed_dim: D.
        head_dim: d.
        heads: indices of the heads that are left; relative position and its gate are looked up by them.
        full_heads: heads before pruning.
        dropout: attention dropout probability.
        relative_position: whether WavLM's gated relative position is used.
        gate_heads: put a hard-concrete gate on every head.
        gate_output: put one hard-concrete gate on the whole sublayer.
    """

    heads: Tensor

    def __init__(
        self,
        embed_dim: int,
        head_dim: int,
        heads: List[int],
        full_heads: int,
        dropout: float = 0.0,
        relative_position: bool = False,
        gate_heads: bool = False,
        gate_output: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.head_dim = head_dim
        self.dropout = dropout
        self.register_buffer("heads", torch.tensor(heads, dtype=torch.long), persistent=False)
        width = len(heads) * head_dim
        if heads:
            self.q_proj = nn.Linear(embed_dim, width)
            self.k_proj = nn.Linear(embed_dim, width)
            self.v_proj = nn.Linear(embed_dim, width)
        self.out_proj: Union[nn.Linear, OutputBias]
        self.out_proj = nn.Linear(width, embed_dim) if heads else OutputBias(embed_dim)
        self.position_gate = RelativePositionGate(head_dim, full_heads) if relative_position and heads else None
        self.gate = HardConcrete(len(heads)) if gate_heads and heads else None
        self.output_gate = HardConcrete(1) if gate_output else None

    def forward(
        self, x: Tensor, position_bias: Optional[Tensor] = None, padding_mask: Optional[Tensor] = None
    ) -> Tensor:
        """Args:
            x: (B, T, D) frames.
            position_bias: (full heads, T, T), or None.
            padding_mask: (B, T) bool, True = padding, or None where nothing is padded.

        Returns:
            (B, T, D).
        """
        if self.heads.numel():
            y = self._attend(x, position_bias, padding_mask)
        else:
            y = self.out_proj(x)
        return y if self.output_gate is None else y * self.output_gate().to(y.dtype)

    def _attend(self, x: Tensor, position_bias: Optional[Tensor], padding_mask: Optional[Tensor]) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = None
        if position_bias is not None and self.position_gate is not None:
            if self.heads.numel() < position_bias.size(0):
                position_bias = position_bias[self.heads]
            bias = self.position_gate(x, self.heads) * position_bias
        if padding_mask is not None:
            hidden = padding_mask[:, None, None, :]
            if bias is None:
                bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
            else:
                bias = bias.masked_fill(hidden, float("-inf"))
        y = attend(q, k, v, bias, self.dropout if self.training else 0.0).transpose(1, 2)  # (B, T, h, d)
        if self.gate is not None:
            y = y * self.gate().to(y.dtype).unsqueeze(-1)
        return self.out_proj(y.flatten(2))
