"""Pruning without training: the units of the smallest weights go, an equal share of every gate's.

A baseline for what distillation and learnt gates add. A unit's score is the norm of its filter (conv channels), or the
product of the norms of what makes it and what reads it: rows of ``v_proj`` and columns of ``out_proj`` of a head,
row of ``fc1`` and column of ``fc2`` of an FFN unit.
"""

from __future__ import annotations

from typing import List, Optional

import torch
from torch import Tensor, nn

from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.gate_bank import HardConcrete
from skill_fairseq.pruning.shrink import shrink

_OPEN = 30.0  # sigmoid(0.8 * 30 / beta) is 1 in float32: gates scale nothing


def conv_scores(weight: Tensor) -> Tensor:
    """(C_out, C_in, K) filters to (C_out,) norms."""
    return weight.flatten(1).norm(dim=1)


def head_scores(v_proj: Tensor, out_proj: Tensor, head_dim: int) -> Tensor:
    """(H * head_dim, D) and (D, H * head_dim) weights to (H,) products of norms."""
    made = v_proj.unflatten(0, (-1, head_dim)).flatten(1).norm(dim=1)
    return made * out_proj.T.unflatten(0, (-1, head_dim)).flatten(1).norm(dim=1)


def ffn_scores(fc1: Tensor, fc2: Tensor) -> Tensor:
    """(F, D) and (D, F) weights to (F,) products of norms."""
    return fc1.norm(dim=1) * fc2.norm(dim=0)


def ranks(scores: Tensor) -> Tensor:
    """Place of each unit among its gate's, (n,) float32 in (0, 1), ascending with the score; equal ones by index."""
    n = len(scores)
    places = torch.empty(n)
    places[scores.sort(stable=True).indices] = (torch.arange(n) + 0.5) / n  # torch 1.13's argsort has no stable
    return places


@torch.no_grad()
def prune_by_magnitude(encoder: SpeechEncoder, sparsity: float, units: List[str]) -> SpeechEncoder:
    """A smaller encoder of the same weights, of those that are left.

    Args:
        encoder: without gates.
        sparsity: fraction of the parameters to remove, in [0, 1).
        units: what may go, out of conv, heads, ffn.

    Returns:
        a new encoder; its size is right to the smallest unit.

    Raises:
        ValueError: the encoder has gates, or the sparsity cannot be reached.
    """
    if encoder.config.pruning_units:
        raise ValueError("the encoder has gates already; give one without, a teacher")
    size = encoder.config.original_parameters or encoder.num_parameters()
    gated = SpeechEncoder(encoder.config.replace(pruning_units=list(units), original_parameters=size))
    gated.to(encoder.feature_projection.linear.weight.dtype)
    gated.load_state_dict(encoder.state_dict(), strict=False)
    for conv in gated.feature_extractor.layers:
        _set_gate(conv.gate, conv_scores(conv.conv.weight))
    for layer in gated.transformer.layers:
        attention, ffn = layer.attention, layer.ffn
        if isinstance(attention, SelfAttention) and isinstance(attention.out_proj, nn.Linear):
            scores = head_scores(attention.v_proj.weight, attention.out_proj.weight, attention.head_dim)
            _set_gate(attention.gate, scores)
        if isinstance(ffn, FeedForward) and isinstance(ffn.fc2, nn.Linear):
            _set_gate(ffn.gate, ffn_scores(ffn.fc1.weight, ffn.fc2.weight))
    return shrink(gated.eval(), sparsity)


def _set_gate(gate: Optional[HardConcrete], scores: Tensor) -> None:
    if gate is not None:
        gate.log_alpha.copy_(_OPEN + ranks(scores))
