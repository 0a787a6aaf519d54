"""Costs of encoders: original, expected under the gates, and least possible."""

from __future__ import annotations

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.hard_concrete import keep_probability
from skill_fairseq.modules.size import Widths, flat_widths, from_flat, widths_of
from skill_fairseq.modules.units import UNITS
from skill_fairseq.pruning.costs import PARAMETERS, Cost


def full_parameters(config: EncoderConfig) -> int:
    """Parameters of the original, unpruned shape, which sparsity refers to."""
    return PARAMETERS.original(config)


def expected_widths(encoder: SpeechEncoder, shift: float | Tensor = 0.0) -> Widths:
    """Expected widths under the gates; differentiable with gates, integers without.

    Args:
        encoder: with or without gates.
        shift: see :meth:`GateBank.expected_widths`.
    """
    exact = widths_of(encoder.config)
    return exact if encoder.gates is None else from_flat(encoder.gates.expected_widths(shift), exact)


def expected_parameters(encoder: SpeechEncoder, shift: float = 0.0) -> Tensor:
    """Expected number of parameters under the gates, a float32 scalar with gradient (an int without gates).

    Args:
        encoder: with or without gates.
        shift: added to every ``log_alpha``, see :func:`expected_widths`.
    """
    return PARAMETERS(encoder.config, expected_widths(encoder, shift))  # type: ignore[return-value]


@torch.no_grad()
def expected_sparsity(encoder: SpeechEncoder, shift: float = 0.0, cost: Cost = PARAMETERS) -> float:
    """Expected removed fraction of the original cost, with ``shift`` added to every ``log_alpha``."""
    return 1 - float(cost(encoder.config, expected_widths(encoder, shift))) / cost.original(encoder.config)


def starting_widths(encoder: SpeechEncoder) -> Widths:
    """Expected widths at the start of training, from the gates' drop rates; numbers."""
    exact = widths_of(encoder.config)
    flat = flat_widths(exact)
    for _, gate in encoder.named_gates():
        start = torch.tensor(1 / gate.drop_rate - 1, dtype=torch.float64).log()
        flat[gate.position] = gate.num_units * keep_probability(start).item()
    return from_flat(flat, exact)


def smallest_widths(config: EncoderConfig) -> Widths:
    """Widths with every closable gate closed: the least possible."""
    return {
        name: UNITS[name].smallest(config) if name in config.pruning_units else column
        for name, column in widths_of(config).items()
    }
