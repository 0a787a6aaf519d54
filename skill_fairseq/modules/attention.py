"""Multi-head self-attention with WavLM's gated relative position, over the remaining heads."""

from __future__ import annotations

from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.attention_core import Kernel, attend, attend_with_maps
from skill_fairseq.modules.gate_bank import Draw, HardConcrete
from skill_fairseq.modules.output_bias import OutputBias
from skill_fairseq.modules.slicing import (
    all_units,
    computed_units,
    gated_output,
    has_plain_weight,
    linear,
    take,
)
from skill_fairseq.modules.taps import AttentionMaps


class RelativePositionGate(nn.Module):
    """Gates the position bias by the content of the query frame (Chen et al. 2022, equations 4-6).

    Args:
        head_dim: d, features per head.
        num_heads: heads before pruning; ``grep_a`` keeps an entry for each.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        self.grep_linear = nn.Linear(head_dim, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        """Args:
            x: (B, T, D) input of the attention.
            heads: (h,) indices of the heads to compute.

        Returns:
            (B, h, T, 1) factor of the position bias.
        """
        num_heads = self.grep_a.size(1)
        x = x.unflatten(-1, (num_heads, -1))
        if heads.numel() < num_heads:
            x = x.index_select(2, heads)
        if has_plain_weight(self.grep_linear):
            # Each of the two gates sums four outputs, so their weights can be summed instead.
            weight = self.grep_linear.weight.unflatten(0, (2, 4)).sum(1)
            bias = self.grep_linear.bias.unflatten(0, (2, 4)).sum(1)
            gates = F.linear(x, weight, bias).sigmoid()  # (B, T, h, 2)
        else:
            gates = self.grep_linear(x).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gates.transpose(1, 2).unsqueeze(-1).unbind(3)  # (B, h, T, 1) each
        return update * (reset * self.grep_a[:, heads] - 1.0) + 2.0


class SelfAttention(nn.Module):
    """Self-attention over the heads ``heads`` of ``full_heads``; without heads it returns its output bias.

    Args:
        embed_dim: D.
        head_dim: d.
        heads: indices of the remaining heads; they index relative position and its gate.
        full_heads: heads before pruning.
        dropout: attention dropout probability.
        relative_position: whether WavLM's gated relative position is used.
        reuses: whether it uses another layer's attention map, and has no query, key and relative position.

    Attributes:
        gate: gate of the heads, or None.
        output_gate: gate of the whole sublayer, or None.
        attend, attend_with_maps: functions that compute softmax and values; exported graphs replace them.
    """

    attend: Kernel = staticmethod(attend)
    attend_with_maps = staticmethod(attend_with_maps)
    heads: Tensor
    gate: Optional[HardConcrete] = None
    output_gate: Optional[HardConcrete] = None

    def __init__(
        self,
        embed_dim: int,
        head_dim: int,
        heads: List[int],
        full_heads: int,
        dropout: float = 0.0,
        relative_position: bool = False,
        reuses: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.head_dim = head_dim
        self.dropout = dropout
        self.register_buffer("heads", torch.tensor(heads, dtype=torch.long), persistent=False)
        width = len(heads) * head_dim
        self.reuses = reuses
        if heads and not reuses:
            self.q_proj = nn.Linear(embed_dim, width)
            self.k_proj = nn.Linear(embed_dim, width)
        if heads:
            self.v_proj = nn.Linear(embed_dim, width)
        self.out_proj: Union[nn.Linear, OutputBias]
        self.out_proj = nn.Linear(width, embed_dim) if heads else OutputBias(embed_dim)
        gated = relative_position and heads and not reuses
        self.position_gate = RelativePositionGate(head_dim, full_heads) if gated else None

    def forward(
        self,
        x: Tensor,
        by_offset: Optional[Tensor] = None,
        padding_mask: Optional[Tensor] = None,
        draw: Optional[Draw] = None,
        with_maps: bool = False,
        reused: Optional[AttentionMaps] = None,
    ) -> Union[Tensor, Tuple[Tensor, AttentionMaps]]:
        """Args:
            x: (B, T, D) frames.
            by_offset: (full heads, 2T - 1) position bias from :class:`RelativePosition`, or None.
            padding_mask: (B, T) bool, True = padding, or None without padding.
            draw: the gates of this forward, or None.
            with_maps: also return the attention maps, including those of closed heads; at least one head must remain.
                This computes the whole layer, with (B, H, T, T) memory.
            reused: the maps of another layer, if ``reuses``; they are returned if maps are requested.

        Returns:
            (B, T, D), and the maps if requested.
        """
        if self.reuses:
            assert reused is not None
            y = self._attend_reused(x, reused.heads, draw)
            return (y, reused) if with_maps else y
        units, output = (None, None) if draw is None else (draw.of(self.gate), draw.of(self.output_gate))
        if with_maps:
            maps: List[Tensor] = []
            units = all_units(units, self.heads.numel())
            y = self._attend(x, by_offset, padding_mask, draw, maps)
            y = y if output is None else y * output.gate.to(y.dtype)
            return y, AttentionMaps(maps[0], None if units is None else units.gate.detach())
        if not self.heads.numel():
            return gated_output(self, output, [x], lambda: self.out_proj(x))
        return gated_output(self, output, [x, by_offset], lambda: self._attend(x, by_offset, padding_mask, draw))

    def _attend_reused(self, x: Tensor, weights: Tensor, draw: Optional[Draw]) -> Tensor:
        """This layer's values weighted by another layer's (B, h, T, T) maps, without dropout (ARMHuBERT,
        arXiv:2305.11685)."""
        v = linear(self.v_proj, x, draw=draw).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        y = (weights.to(v.dtype) @ v).transpose(1, 2)
        return linear(self.out_proj, y.flatten(2), draw=draw)

    def _attend(
        self,
        x: Tensor,
        by_offset: Optional[Tensor],
        padding_mask: Optional[Tensor],
        draw: Optional[Draw],
        maps: Optional[List[Tensor]] = None,
    ) -> Tensor:
        """Computes only heads with open gates; appends their (B, h, T, T) attention maps to ``maps``."""
        units = None if draw is None else draw.of(self.gate)
        if maps is not None:
            units = all_units(units, self.heads.numel())
        layers = (self.q_proj, self.k_proj, self.v_proj)
        units = computed_units(units, self.heads.numel(), *layers, self.out_proj)
        rows = heads = None
        if units is not None and units.indices is not None:
            heads = units.indices
            rows = (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()
        q, k, v = (linear(proj, x, rows, draw).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in layers)
        factor = None
        if by_offset is not None and self.position_gate is not None:
            original = self.heads if heads is None else self.heads[heads]
            by_offset = by_offset if original.numel() == by_offset.size(0) else by_offset.index_select(0, original)
            factor = self.position_gate(x, original)
        else:
            by_offset = None
        inputs = (q, k, v, factor, by_offset, padding_mask, self.dropout if self.training else 0.0)
        if maps is None:
            y = self.attend(*inputs)
        else:
            y, weights = self.attend_with_maps(*inputs)
            maps.append(weights)
        if units is None:
            return linear(self.out_proj, y.flatten(2), draw=draw)
        if not has_plain_weight(self.out_proj):
            return linear(self.out_proj, (y * units.gate.to(y.dtype)[:, None]).flatten(2), draw=draw)
        weight = take(self.out_proj.weight, 1, rows)  # type: ignore[arg-type]
        weight = weight * units.gate.to(weight.dtype).repeat_interleave(self.head_dim)
        return F.linear(y.flatten(2), weight, self.out_proj.bias)
