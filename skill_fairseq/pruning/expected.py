"""What encoders cost as they are, as their gates expect them to become, and at the least."""

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
    """Parameters of the original, unpruned shape: what sparsity refers to."""
    return PARAMETERS.original(config)


def expected_widths(encoder: SpeechEncoder, shift: float | Tensor = 0.0) -> Widths:
    """Widths under the gates' probabilities; differentiable where there are gates, integers where not.

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
    """Fraction of the original cost that the gates expect to go, their ``log_alpha`` moved by ``shift``."""
    return 1 - float(cost(encoder.config, expected_widths(encoder, shift))) / cost.original(encoder.config)


def starting_widths(encoder: SpeechEncoder) -> Widths:
    """Widths that the gates expect where training starts them, by their drop rates: numbers."""
    exact = widths_of(encoder.config)
    flat = flat_widths(exact)
    for _, gate in encoder.named_gates():
        start = torch.tensor(1 / gate.drop_rate - 1, dtype=torch.float64).log()
        flat[gate.position] = gate.num_units * keep_probability(start).item()
    return from_flat(flat, exact)


def smallest_widths(config: EncoderConfig) -> Widths:
    """Widths if every gate closed that may close: the least that can be reached."""
    return {
        name: UNITS[name].smallest(config) if name in config.pruning_units else column
        for name, column in widths_of(config).items()
    }
