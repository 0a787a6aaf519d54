"""Cutting closed gates out: a smaller encoder with the same outputs."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor

from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.gate_bank import HardConcrete
from skill_fairseq.modules.hard_concrete import deterministic_gate
from skill_fairseq.modules.output_bias import OutputBias
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.expected import full_parameters
from skill_fairseq.pruning.selection import Selection, select_units

State = Dict[str, Tensor]


@torch.no_grad()
def shrink(encoder: SpeechEncoder, sparsity: Optional[float] = None, cost: Cost = PARAMETERS) -> SpeechEncoder:
    """A physically smaller encoder that computes what the gated one computes in evaluation.

    Units whose gate is closed are cut out; the soft value of an open gate is folded into the next weights. Without
    ``sparsity`` the gates decide, and outputs agree to float rounding. With it, a global correction first makes the
    cost right (see :func:`select_units`), and outputs agree with the gated encoder under the same selection.

    Args:
        encoder: with gates; left as it is. It may have been shrunk and gated before.
        sparsity: fraction of the original cost to remove, in [0, 1); None: as the gates round.
        cost: what the sparsity is of.

    Returns:
        A new encoder without gates, in evaluation mode, on the same device and of the same dtype.

    Raises:
        ValueError: the encoder has no gates, a convolution would lose all its channels, or the sparsity cannot be
            reached.
    """
    selection = select_units(encoder, sparsity, cost)
    state: State = {}
    conv_channels = _shrink_conv_stack(encoder, selection, state)
    heads: List[Optional[List[int]]] = []
    ffn_dims: List[Optional[int]] = []
    for i, layer in enumerate(encoder.transformer.layers):
        prefix = f"transformer.layers.{i}"
        heads.append(_shrink_attention(layer.attention, f"{prefix}.attention", selection, state))
        ffn_dims.append(_shrink_ffn(layer.ffn, f"{prefix}.ffn", selection, state))

    config = encoder.config.replace(
        conv_channels=conv_channels,
        heads=heads,
        ffn_dims=ffn_dims,
        pruning_units=[],
        original_parameters=full_parameters(encoder.config),
    )
    like = encoder.feature_projection.linear.weight
    small = SpeechEncoder(config, encoder.dropouts).eval().to(like.device, like.dtype)
    # What no gate touches (positional convolution, relative position, layer norms) stays as it is.
    untouched = {k: v for k, v in encoder.state_dict().items() if k in small.state_dict() and k not in state}
    small.load_state_dict({**untouched, **state})
    return small


def describe_units(left: Optional[int], full: int) -> str:
    """What is left of a sublayer, for people: "3 / 12"; without units "bias only", of none "removed".

    Args:
        left: number of heads or FFN units; 0 and None as in EncoderConfig.
        full: before pruning.
    """
    if left is None:
        return "removed"
    return f"{left} / {full}" if left else "bias only"


def _decide(
    gate: Optional[HardConcrete], name: str, selection: Selection, width: int, like: Tensor
) -> Tuple[Tensor, Tensor]:
    """Indices of the units that stay, and the factor of each."""
    if gate is None:
        return torch.arange(width, device=like.device), torch.ones(width, device=like.device)
    kept = selection[name].nonzero().flatten()
    return kept, deterministic_gate(gate.log_alpha, selection[name])[kept]


def _shrink_conv_stack(encoder: SpeechEncoder, selection: Selection, state: State) -> List[int]:
    """Convolutions and feature projection; returns the channels left."""
    channels: List[int] = []
    inputs = factor_in = torch.empty(0)
    for i, layer in enumerate(encoder.feature_extractor.layers):
        prefix = f"feature_extractor.layers.{i}"
        weight = layer.conv.weight
        kept, factor = _decide(layer.gate, f"{prefix}.gate", selection, weight.size(0), weight)
        if not len(kept):
            raise ValueError(
                f"{prefix}: all channels are gated off, which no audio can pass; train longer with a lower "
                "criterion.target_sparsity, or give shrink() a sparsity"
            )
        weight = weight[kept]
        if i:
            weight = weight[:, inputs] * factor_in[None, :, None]
        state[f"{prefix}.conv.weight"] = weight
        if layer.conv.bias is not None:
            state[f"{prefix}.conv.bias"] = layer.conv.bias[kept]
        if layer.norm is not None:
            state[f"{prefix}.norm.weight"] = layer.norm.weight[kept]
            state[f"{prefix}.norm.bias"] = layer.norm.bias[kept]
        channels.append(len(kept))
        inputs, factor_in = kept, factor
    projection = encoder.feature_projection
    # A LayerNorm follows, which the last gates cannot be folded through.
    state["feature_extractor.scale"] = encoder.feature_extractor.scale[inputs] * factor_in
    state["feature_projection.norm.weight"] = projection.norm.weight[inputs]
    state["feature_projection.norm.bias"] = projection.norm.bias[inputs]
    state["feature_projection.linear.weight"] = projection.linear.weight[:, inputs]
    return channels


def _output_factor(module: Union[SelfAttention, FeedForward], prefix: str, selection: Selection) -> Optional[Tensor]:
    """Factor of a whole sublayer, or None where it is to be removed."""
    gate = module.output_gate
    if gate is None:
        return torch.ones(1, device=next(module.parameters()).device)
    name = f"{prefix}.output_gate"
    return deterministic_gate(gate.log_alpha, selection[name]) if selection[name].any() else None


def _shrink_attention(
    attention: Optional[SelfAttention], prefix: str, selection: Selection, state: State
) -> Optional[List[int]]:
    """One attention sublayer; returns the original indices of the heads left, None where it goes altogether."""
    if attention is None:
        return None
    output = _output_factor(attention, prefix, selection)
    if output is None:
        return None
    state[f"{prefix}.out_proj.bias"] = attention.out_proj.bias * output
    if isinstance(attention.out_proj, OutputBias):
        return []
    like = attention.out_proj.weight
    kept, factor = _decide(attention.gate, f"{prefix}.gate", selection, attention.heads.numel(), like)
    if not len(kept):
        return []
    dim = attention.head_dim
    rows = (kept[:, None] * dim + torch.arange(dim, device=kept.device)).flatten()
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        state[f"{prefix}.{name}.weight"] = projection.weight[rows]
        state[f"{prefix}.{name}.bias"] = projection.bias[rows]
    state[f"{prefix}.out_proj.weight"] = like[:, rows] * factor.repeat_interleave(dim) * output
    return attention.heads[kept].tolist()


def _shrink_ffn(ffn: Optional[FeedForward], prefix: str, selection: Selection, state: State) -> Optional[int]:
    """One feed-forward sublayer; returns the units left, None where it goes altogether."""
    if ffn is None:
        return None
    output = _output_factor(ffn, prefix, selection)
    if output is None:
        return None
    state[f"{prefix}.fc2.bias"] = ffn.fc2.bias * output
    if isinstance(ffn.fc2, OutputBias):
        return 0
    kept, factor = _decide(ffn.gate, f"{prefix}.gate", selection, ffn.width, ffn.fc2.weight)
    if len(kept):
        state[f"{prefix}.fc1.weight"] = ffn.fc1.weight[kept]
        state[f"{prefix}.fc1.bias"] = ffn.fc1.bias[kept]
        state[f"{prefix}.fc2.weight"] = ffn.fc2.weight[:, kept] * factor * output
    return len(kept)
