"""Shrinks transformers models by replacing modules with those of a shrunk encoder."""

from __future__ import annotations

import copy
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.output_bias import OutputBias
from skill_fairseq.modules.relative_position import RelativePosition
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.huggingface import as_encoder, detach, encoder_config
from skill_fairseq.pruning.shrink import shrink
from skill_fairseq.pruning.targets import Asked


@torch.no_grad()
def shrink_model(model: Any, sparsity: Optional[Asked] = None, cost: Cost = PARAMETERS) -> Any:
    """:func:`skill_fairseq.pruning.shrink` for transformers models.

    The result is a copy of the model with smaller modules, of the same class, with its shape in ``encoder_shape``.
    ``from_pretrained`` cannot rebuild it: see :func:`as_encoder` for saving. WavLM's attention no longer returns
    attention maps.
    """
    encoder_config(model, "shrink")  # refuses other models
    small = shrink(as_encoder(model), sparsity, cost)
    like = model.feature_projection.projection.weight
    small.to(like.device, like.dtype)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # With weight norm of torch < 2.1 the weight is a computed tensor, which cannot be copied and is recomputed.
    results = [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor) and v.grad_fn]
    result = copy.deepcopy(model, {id(v): v.detach() for v in results}).eval()
    detach(result)
    _transplant(result, small)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(trains.get(name, True))
    result.encoder_shape = small.config
    return result


def _transplant(model: Any, small: SpeechEncoder) -> None:
    """Moves the small encoder's modules into the model, which keeps its own forward."""
    stack = small.feature_extractor
    for theirs, ours in zip(model.feature_extractor.conv_layers, stack.layers):
        theirs.conv = ours.conv
        theirs.in_conv_dim, theirs.out_conv_dim = ours.conv.in_channels, ours.conv.out_channels
        if ours.norm is not None:
            theirs.layer_norm = ours.norm
    last = model.feature_extractor.conv_layers[-1]
    function = last.activation.function if isinstance(last.activation, ScaledActivation) else last.activation
    last.activation = ScaledActivation(function, stack.scale)
    if small.feature_projection.norm is not None:
        model.feature_projection.layer_norm = small.feature_projection.norm
    model.feature_projection.projection = small.feature_projection.linear
    first = model.encoder.layers[0]
    for layer, small_layer in zip(model.encoder.layers, small.transformer.layers):
        layer.attention = _attention(layer.attention, small_layer.attention, small)
        layer.feed_forward = _feed_forward(layer.feed_forward, small_layer.ffn)
        if small.config.relative_position:  # the table's place in transformers
            layer.attention.relative_position = small.transformer.relative_position if layer is first else None


def _attention(theirs: Any, ours: Optional[SelfAttention], small: SpeechEncoder) -> nn.Module:
    if small.config.relative_position:
        if ours is None:
            return NoHeads(None, 3)
        ours.dropout = theirs.dropout
        ours.__class__ = PrunedWavLMAttention
        return ours
    if ours is None or isinstance(ours.out_proj, OutputBias):
        bias = None if ours is None else ours.out_proj
        weight = small.feature_extractor.layers[0].conv.weight
        return NoHeads(bias, len(theirs(weight.new_zeros(1, 1, small.config.encoder_embed_dim))))
    theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.out_proj = ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj
    theirs.num_heads, theirs.embed_dim = ours.heads.numel(), ours.out_proj.in_features  # transformers < 4.48 reshapes
    return theirs  # type: ignore[no-any-return]


def _feed_forward(theirs: Any, ours: Optional[FeedForward]) -> nn.Module:
    if ours is None:
        return NoUnits()
    theirs.intermediate_dense = ours.fc1 if ours.width else nn.Identity()
    theirs.output_dense = ours.fc2
    return theirs  # type: ignore[no-any-return]


class ScaledActivation(nn.Module):
    """An activation, then the gates' soft values, which cannot be folded into the following LayerNorm.

    Args:
        function: the activation.
        scale: (C,), one factor per channel.
    """

    scale: Tensor

    def __init__(self, function: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        return self.function(x) * self.scale[:, None]  # type: ignore[no-any-return]


class PrunedWavLMAttention(SelfAttention):
    """Our attention with the interface of transformers' ``WavLMAttention``; layer 0 holds the position table."""

    relative_position: Optional[RelativePosition]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_bias: Optional[Tensor] = None,
        output_attentions: bool = False,
        index: int = 0,
        **kwargs: Any,
    ) -> Tuple[Tensor, None, Optional[Tensor]]:
        """Args:
            hidden_states: (B, T, D).
            attention_mask: (B, T), 1 = audio, 0 = padding; or None.
            position_bias: (full heads, 2T - 1), from layer 0.
            output_attentions, index, kwargs: not used.

        Returns:
            (B, T, D), None instead of attention maps, and the position bias for the following layers.
        """
        if position_bias is None and self.relative_position is not None:
            position_bias = self.relative_position(hidden_states.size(1))
        padding = None if attention_mask is None else attention_mask.ne(1)
        x = super().forward(hidden_states, position_bias, padding)
        assert isinstance(x, Tensor)
        return x, None, position_bias


class NoHeads(nn.Module):
    """Replaces an attention without heads: returns its output bias, or zeros if the whole sublayer was removed.

    Args:
        out_proj: the remaining output projection, or None.
        num_outputs: length of the original's output tuple.
    """

    def __init__(self, out_proj: Optional[nn.Module], num_outputs: int) -> None:
        super().__init__()
        self.relative_position: Optional[RelativePosition] = None
        self.out_proj = out_proj
        self.num_outputs = num_outputs

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_bias: Optional[Tensor] = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tuple[Optional[Tensor], ...]:
        """See :meth:`PrunedWavLMAttention.forward`; models without relative positions have no position bias."""
        if position_bias is None and self.relative_position is not None:
            position_bias = self.relative_position(hidden_states.size(1))
        y = torch.zeros_like(hidden_states) if self.out_proj is None else self.out_proj(hidden_states)
        return (y, None, position_bias)[: self.num_outputs]


class NoUnits(nn.Module):
    """Replaces a removed feed-forward sublayer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to zeros."""
        return torch.zeros_like(hidden_states)
