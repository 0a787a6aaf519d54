"""Features of raw waveforms: converts them to the encoder's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from skill_fairseq.modules.encoder import SpeechEncoder


class Features(NamedTuple):
    """Features of one or several utterances.

    Attributes:
        states: one tensor (B, T, D) for each requested layer, in that order; zeros after the end of shorter utterances.
        lengths: (B,) int64, frames of each utterance.
    """

    states: list[Tensor]
    lengths: Tensor


def features_of(
    encoder: SpeechEncoder, waves: Any, sampling_rate: int, layers: Optional[Sequence[int]] = None
) -> Features:
    """See :meth:`skill_fairseq.modules.encoder.SpeechEncoder.features`."""
    if encoder.training:
        raise ValueError("the encoder is in training mode; call eval() first")
    depth = encoder.config.encoder_layers
    layers = range(depth + 1) if layers is None else layers
    wrong = [layer for layer in layers if isinstance(layer, bool) or layer not in range(depth + 1)]
    if wrong or not len(layers):
        raise ValueError(f"layers: {list(layers)}; expected at least one, numbers from 0 to {depth}")
    several = isinstance(waves, (list, tuple))
    device = next(encoder.parameters()).device
    prepared = [_prepared(encoder, wave, sampling_rate, device) for wave in (waves if several else [waves])]
    if not prepared:
        raise ValueError("waves: an empty list; expected at least one waveform")
    found: list[list[Tensor]] = [[]] * len(prepared)
    with torch.no_grad():
        # Batches utterances of equal length, because padding would change the features of Base models.
        for length in {len(wave) for wave in prepared}:
            members = [index for index, wave in enumerate(prepared) if len(wave) == length]
            states = encoder(torch.stack([prepared[i] for i in members]), last_layer=max(layers)).hidden_states
            for row, index in enumerate(members):
                found[index] = [states[layer][row] for layer in layers]
    lengths = torch.tensor([len(states[0]) for states in found])
    return Features([torch.nn.utils.rnn.pad_sequence(list(layer), batch_first=True) for layer in zip(*found)], lengths)


def _prepared(encoder: SpeechEncoder, wave: Any, sampling_rate: int, device: torch.device) -> Tensor:
    """(N,) float32 at the encoder's rate, normalised if the encoder expects it."""
    wave = torch.as_tensor(wave)
    if wave.dim() != 1 or not wave.is_floating_point():
        raise ValueError(
            f"waves: {wave.dtype} of shape {tuple(wave.shape)}; expected floating-point samples (N,) between -1 and 1, "
            "or a list of such: take one channel, and divide 16-bit integers by 32768"
        )
    wave, rate = wave.to(torch.float32), encoder.config.sample_rate
    if sampling_rate != rate:
        wave = _resampled(wave, sampling_rate, rate)
    wave = wave.to(device)
    return F.layer_norm(wave, wave.shape) if encoder.normalize else wave


def _resampled(wave: Tensor, given: int, wanted: int) -> Tensor:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"sampling_rate: {given!r}; expected a whole number of Hz, such as {wanted}")
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ValueError(
            f"sampling_rate: {given}, but the encoder takes {wanted} Hz; resample the audio, or install scipy: "
            "pip install scipy"
        ) from error
    return torch.from_numpy(resample_poly(wave.cpu().numpy(), wanted, given))
