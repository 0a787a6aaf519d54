"""Magnitude pruning without training: removes the units with the smallest weights, the same share of every gate.

A baseline for distillation and learned gates. A unit's score is the norm of its filter (conv channels), or the product
of the norms of its input and output weights (heads, FFN units).
"""

from __future__ import annotations

from typing import List

import torch
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.units import UNITS, with_units
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.shrink import shrink

_OPEN = 30.0  # sigmoid(0.8 * 30 / beta) is 1 in float32, so gates do not scale


def ranks(scores: Tensor) -> Tensor:
    """Relative rank of each unit within its gate, (n,) float32 in (0, 1), ascending with the score, ties by index."""
    n = len(scores)
    places = torch.empty(n)
    places[scores.sort(stable=True).indices] = (torch.arange(n) + 0.5) / n  # torch 1.13's argsort has no stable
    return places


@torch.no_grad()
def prune_by_magnitude(
    encoder: SpeechEncoder, sparsity: float, units: List[str], cost: Cost = PARAMETERS
) -> SpeechEncoder:
    """Prunes an encoder without changing the remaining weights.

    Args:
        encoder: without gates.
        sparsity: fraction of the cost to remove, in [0, 1).
        units: kinds of units to remove, among those with a score.
        cost: the cost that the sparsity refers to.

    Returns:
        a new encoder, of the requested size to within the smallest unit.

    Raises:
        ValueError: the encoder has gates, a kind has no score, or the sparsity cannot be reached.
    """
    if encoder.config.pruning_units:
        raise ValueError("the encoder has gates already; give one without, a teacher")
    size = encoder.config.original_parameters or encoder.num_parameters()
    gated = SpeechEncoder(encoder.config.replace(pruning_units=list(units), original_parameters=size))
    gated.to(encoder.feature_extractor.layers[0].conv.weight.dtype)
    gated.load_state_dict(with_units(gated.config, encoder.state_dict(), encoder.config), strict=False)
    for _, gate in gated.named_gates():
        gate.log_alpha.copy_(_OPEN + ranks(UNITS[gate.unit].scores(gated, gate.site)))
    return shrink(gated.eval(), sparsity, cost)
