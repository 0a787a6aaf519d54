"""Sizes of encoders as they are and as their gates expect them to become."""

from __future__ import annotations

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import Widths, count_parameters, static_shape, widths_of


def full_parameters(config: EncoderConfig) -> int:
    """Parameters of the original, unpruned shape: what sparsity refers to."""
    if config.original_parameters:
        return config.original_parameters
    full = config.replace(conv_channels=None, heads=None, ffn_dims=None)
    return int(count_parameters(static_shape(full), widths_of(full)))


def expected_widths(encoder: SpeechEncoder, shift: float = 0.0) -> Widths:
    """Widths under the gates' probabilities; differentiable where there are gates, integers where not.

    Args:
        encoder: with or without gates.
        shift: added to every ``log_alpha``, to see what would be if the gates moved so far.
    """
    exact = widths_of(encoder.config)
    if encoder.gates is None:
        return exact
    with_heads = sum(bool(heads) and bool(present) for heads, present in exact.attention())
    return Widths.from_flat(encoder.gates.expected_widths(shift), len(exact.conv), len(exact.heads), with_heads)


def expected_parameters(encoder: SpeechEncoder, shift: float = 0.0) -> Tensor:
    """Expected number of parameters under the gates, a float32 scalar with gradient (an int without gates).

    Args:
        encoder: with or without gates.
        shift: added to every ``log_alpha``, see :func:`expected_widths`.
    """
    widths = expected_widths(encoder, shift)
    return count_parameters(static_shape(encoder.config), widths)  # type: ignore[return-value]


@torch.no_grad()
def expected_sparsity(encoder: SpeechEncoder, shift: float = 0.0) -> float:
    """Fraction of the original parameters that the gates expect to go, their ``log_alpha`` moved by ``shift``."""
    return 1 - float(expected_parameters(encoder, shift)) / full_parameters(encoder.config)


def smallest_parameters(config: EncoderConfig) -> int:
    """Parameters left if every gate closed but for one channel a convolution: the least that can be reached."""
    widths = widths_of(config)
    units = config.pruning_units
    layers = len(widths.heads)
    nothing = [0] * layers
    attention, ffn = widths.attention_present, widths.ffn_present
    smallest = Widths(
        conv=[1] * len(widths.conv) if "conv" in units else widths.conv,
        heads=nothing if "heads" in units else widths.heads,
        ffn=nothing if "ffn" in units else widths.ffn,
        attention_present=nothing if "attention_layers" in units else attention,
        ffn_present=nothing if "ffn_layers" in units else ffn,
    )
    return int(count_parameters(static_shape(config), smallest))
