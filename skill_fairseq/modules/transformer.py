"""Positional convolution and Transformer layers, each with its own width."""

from __future__ import annotations

import itertools
from typing import Collection, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skill_fairseq.modules.adapter import ResidualAdapter, make_adapter
from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.gate_bank import Draw
from skill_fairseq.modules.layer import EncoderLayer
from skill_fairseq.modules.padding import exporting, reduce_padding_mask
from skill_fairseq.modules.positional_conv import PositionalConv
from skill_fairseq.modules.positional_conv_stack import PositionalConvStack
from skill_fairseq.modules.relative_position import RelativePosition
from skill_fairseq.modules.taps import AttentionMaps


class Dropouts(NamedTuple):
    """Dropout probabilities. Only training uses them, so they are not part of an encoder's shape."""

    hidden: float = 0.0
    attention: float = 0.0
    activation: float = 0.0
    input: float = 0.0
    layerdrop: float = 0.0


class Transformer(nn.Module):
    """Positional convolution and transformer layers.

    Args:
        config: shape.
        dropouts: dropout probabilities.

    Attributes:
        checkpoint_activations: keep only the input of each layer for the backward pass, which recomputes the layer with
            the same dropout and gates (Chen et al. 2016, arXiv:1604.06174).
        layer_grad_scale: after layer i of L, from 0, multiply the gradient from the layers above by m = (L - i) / (L -
            i + 1), and that of a loss on the layer's own state by m (1 - m), as ARMHuBERT's code does.
    """

    def __init__(self, config: EncoderConfig, dropouts: Dropouts) -> None:
        super().__init__()
        self.checkpoint_activations = False
        self.layer_grad_scale = False
        dim = config.encoder_embed_dim
        self.layer_norm_first = config.layer_norm_first
        self.layerdrop = dropouts.layerdrop
        kernel_size, groups, depth = config.pos_conv_kernel, config.conv_pos_groups, config.pos_conv_depth
        self.pos_conv: Union[PositionalConv, PositionalConvStack] = (
            PositionalConv(dim, kernel_size, groups)
            if depth == 1
            else PositionalConvStack(dim, kernel_size, groups, depth)
        )
        self.relative_position = (
            RelativePosition(config.num_buckets, config.max_distance, config.encoder_attention_heads)
            if config.relative_position
            else None
        )
        self.layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropouts.hidden)
        rate = config.time_reduction
        self.time_reduction = nn.Conv1d(dim, dim, rate, stride=rate) if rate > 1 else None
        self.config = config
        layers = []
        assert config.heads is not None and config.ffn_dims is not None
        for layer, (heads, ffn_dim) in enumerate(zip(config.heads, config.ffn_dims), start=1):
            attention = ffn = None
            if heads is not None:
                attention = SelfAttention(
                    dim,
                    config.head_dim,
                    heads,
                    config.encoder_attention_heads,
                    dropouts.attention,
                    config.relative_position,
                    layer in config.reuse_attention,
                )
            if ffn_dim is not None:
                ffn = FeedForward(dim, ffn_dim, config.activation_fn, dropouts.activation)
            width, how = config.adapter_dim, (config.adapter_activation, config.adapter_form)
            adapter = make_adapter(dim, width, *how) if width else None
            layers.append(EncoderLayer(dim, attention, ffn, config.layer_norm_first, dropouts.hidden, adapter))
        self.layers: Sequence[EncoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.apply(_init_like_bert)
        for module in self.modules():
            if isinstance(module, ResidualAdapter):
                module.reset()

    def run(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        draw: Optional[Draw] = None,
        map_layers: Collection[int] = (),
        adapted: bool = True,
    ) -> Iterator[Tuple[Tensor, Optional[AttentionMaps]]]:
        """Computes layer by layer, on demand.

        Args:
            x: (B, T, D) projected features.
            padding_mask: (B, T) bool, True = padding, or None.
            draw: the gates of this forward, or None.
            map_layers: layers, from 1, whose attention maps to return; layerdrop never drops them, nor those whose
                maps other layers reuse.
            adapted: use the adapters, if any.

        Yields:
            a layer's output (B, T / time_reduction, D), before a final LayerNorm, and its attention maps if requested.
        """
        if padding_mask is not None:
            # Only on the CPU: on a GPU the host would wait to check whether the mask has any padding.
            if exporting() or padding_mask.device.type != "cpu" or padding_mask.any():
                x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
            else:
                padding_mask = None
        if padding_mask is not None:
            padding_mask = reduce_padding_mask(padding_mask, self.config)
            # An utterance without frames has no valid output, but with every key masked, kernels differ or give NaN.
            padding_mask = padding_mask & ~padding_mask.all(1, keepdim=True)
        x = x + self.pos_conv(x)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = self.dropout(x)
        if self.time_reduction is not None:
            x = self.time_reduction(x.transpose(1, 2)).transpose(1, 2)
        by_offset = None if self.relative_position is None else self.relative_position(x.size(1))
        sources, wanted = self.config.attention_sources(), set(map_layers)
        with_maps, shared = wanted | set(sources.values()), None
        for layer, block in enumerate(self.layers, start=1):
            dropped = self.training and self.layerdrop > 0 and np.random.random() < self.layerdrop
            wants = layer in with_maps
            inputs = (x, by_offset, padding_mask, draw, wants, shared if layer in sources else None, adapted)
            maps = None
            if wants or not dropped:
                again = self.checkpoint_activations and torch.is_grad_enabled()
                out = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
                x, maps = out if wants else (out, None)
            if layer in sources.values():
                shared = maps
            state = x
            if self.layer_grad_scale and x.requires_grad:
                state = _scale_gradients(x, layer - 1, len(self.layers))
            yield state, maps if layer in wanted else None

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        layer: Optional[int] = None,
        draw: Optional[Draw] = None,
    ) -> Tuple[Tensor, List[Tensor]]:
        """Args:
            x: (B, T, D) projected features.
            padding_mask: (B, T) bool, True = padding, or None.
            layer: index, from 0, of the layer to stop after; None runs all and the final LayerNorm.
            draw: the gates of this forward, or None.

        Returns:
            (B, T, D) output, and the output (B, T, D) of every layer that ran.
        """
        layers = itertools.islice(self.run(x, padding_mask, draw), None if layer is None else layer + 1)
        states = [state for state, _ in layers]
        x = states[-1]
        return (self.layer_norm(x) if self.layer_norm_first and layer is None else x), states


def _scale_gradients(x: Tensor, layer: int, layers: int) -> Tensor:
    """Scales the gradient of a layer's output, see :attr:`Transformer.layer_grad_scale`.

    Args:
        x: output of layer ``layer``, from 0, of ``layers``; later layers use it with the scale.

    Returns:
        the same for losses on this layer itself.
    """
    m = (layers - layer) / (layers - layer + 1)
    own = x.view_as(x)
    x.register_hook(lambda gradient: gradient * m)
    own.register_hook(lambda gradient: gradient * (1 - m))
    return own


def _init_like_bert(module: nn.Module) -> None:
    """BERT's initialisation, as in fairseq's speech encoders."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, RelativePosition):
        nn.init.normal_(module.weight, std=0.02)
