"""One transformer layer; either sublayer may have been removed."""

from __future__ import annotations

from typing import Optional, Tuple, Union

from torch import Tensor, nn

from skill_fairseq.modules.adapter import ResidualAdapter
from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.gate_bank import Draw
from skill_fairseq.modules.taps import AttentionMaps


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network with residual connections.

    Args:
        embed_dim: D.
        attention: the attention sublayer, or None if removed.
        ffn: the feed-forward sublayer, or None if removed.
        layer_norm_first: normalise before each sublayer (Large) instead of after (Base).
        dropout: dropout probability on each sublayer's output.
        adapter: a network beside the feed-forward sublayer, on the same input (a :class:`ResidualAdapter` on the input
            before its LayerNorm), or None; it stays if that sublayer is removed.
    """

    def __init__(
        self,
        embed_dim: int,
        attention: Optional[SelfAttention],
        ffn: Optional[FeedForward],
        layer_norm_first: bool,
        dropout: float = 0.0,
        adapter: Optional[nn.Module] = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = ffn
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.dropout = nn.Dropout(dropout)
        self.adapter = adapter

    @property
    def uses_ffn_norm(self) -> bool:
        """Whether the second LayerNorm has a purpose: before a sublayer or adapter, or after the layer."""
        adapted = self.adapter is not None and not isinstance(self.adapter, ResidualAdapter)
        return not self.layer_norm_first or self.ffn is not None or adapted

    def forward(
        self,
        x: Tensor,
        position_bias: Optional[Tensor] = None,
        padding_mask: Optional[Tensor] = None,
        draw: Optional[Draw] = None,
        with_maps: bool = False,
        reused: Optional[AttentionMaps] = None,
        adapted: bool = True,
    ) -> Union[Tensor, Tuple[Tensor, Optional[AttentionMaps]]]:
        """(B, T, D) to (B, T, D), with or without the adapter; for other arguments see :class:`SelfAttention`."""
        first, maps = self.layer_norm_first, None
        if self.attention is not None:
            y = self.attention_norm(x) if first else x
            y = self.attention(y, position_bias, padding_mask, draw, with_maps, reused)
            y, maps = y if with_maps else (y, None)
            x = x + self.dropout(y)
        if not first:
            x = self.attention_norm(x)
        before = x
        y = self.ffn_norm(x) if first and self.uses_ffn_norm else x
        if self.ffn is not None:
            x = x + self.dropout(self.ffn(y, draw))
        if self.adapter is not None and adapted:
            x = x + self.adapter(before if isinstance(self.adapter, ResidualAdapter) else y)
        x = x if first else self.ffn_norm(x)
        return (x, maps) if with_maps else x
