"""Log-mel features instead of the waveform as the convolutions' input, which saves most of the conv stack's work.

Windows, hop and scaling are Whisper's (Radford et al., 2022, arXiv:2212.04356): the logarithm of power is cut off 8
decades below the utterance's peak and mapped to [-1, 1]. So neither the gain of a recording nor padding with zeros has
an effect, unlike with normalisation over time.
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.fp32 import Float32Module
from skill_fairseq.modules.tf32 import exact_products

EXACT: Any = {"dtype": torch.float64, "device": "cpu"}
"""Dtype and device of constants, even if a model is built on the meta device, as in transformers."""
LOW_HZ = 20.0
FLOOR = 1e-10
"""Least power: digital silence."""
DECADES = 8.0
"""Kept range of power below the peak, decades."""


def mel_filters(n_fft: int, sample_rate: int, n_mels: int) -> Tensor:
    """Triangular filters of height 1, as (n_fft // 2 + 1, n_mels) weights of the power spectrum's bins.

    Kaldi's: equally spaced in mel = 1127 ln(1 + f / 700) from 20 Hz to half the sample rate.
    """
    low, high = (1127.0 * math.log1p(hertz / 700.0) for hertz in (LOW_HZ, sample_rate / 2))
    edges = torch.linspace(low, high, n_mels + 2, **EXACT)
    bins = 1127.0 * torch.log1p(torch.arange(n_fft // 2 + 1, **EXACT) * sample_rate / n_fft / 700.0)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


def scaled(levels: Tensor, peak: Optional[Tensor] = None) -> Tensor:
    """Levels relative to the peak, cut off :data:`DECADES` below it, mapped to [-1, 1].

    Args:
        levels: (B, T, M) log10 of power.
        peak: (B, 1, 1) highest level of the whole utterance; None: that of ``levels``.
    """
    peak = levels.amax((1, 2), keepdim=True) if peak is None else peak.to(levels)
    return torch.maximum(levels - peak, levels.new_tensor(-DECADES)) / (DECADES / 2) + 1


class LogMel(Float32Module):
    """Waveform to log-mel features of 25 ms windows every 10 ms, with zeros around the audio for the convolutions.

    It has no parameters and no entries in a state dict, and computes in float32 (float64 for float64 audio).

    Args:
        config: shape; uses ``mel_bins``, ``sample_rate`` and the convolutions' kernels.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.hop, self.padding = config.mel_hop, config.mel_padding
        size = config.mel_window
        self.register_buffer("window", torch.hann_window(size, **EXACT).float(), persistent=False)
        self.register_buffer("filters", mel_filters(size, config.sample_rate, config.mel_bins), persistent=False)
        self.window: Tensor
        self.filters: Tensor

    def forward(self, source: Tensor, peak: Optional[Tensor] = None) -> Tensor:
        """(B, N) samples to (B, T, M) features in [-1, 1]; for ``peak`` see :func:`scaled`."""
        return scaled(self.levels(F.pad(source, self.padding)), peak)

    def levels(self, source: Tensor) -> Tensor:
        """(B, N) samples to (B, T, M) log10 of mel-filtered power, without padding."""
        frames = source.unfold(1, self.window.numel(), self.hop) * self.window.to(source)
        spectrum = torch.fft.rfft(frames)
        power = spectrum.real.square() + spectrum.imag.square()
        with torch.autocast(source.device.type, enabled=False), exact_products(source.device):
            return (power @ self.filters.to(power)).clamp_min(FLOOR).log10()

    def peak(self, blocks: Iterable[Tensor]) -> Optional[Tensor]:
        """(B, 1, 1) highest level of the whole audio; None if it is too short for a window.

        Args:
            blocks: consecutive (B, n) samples.
        """
        found: Optional[Tensor] = None
        left: Optional[Tensor] = None
        for block in _between(blocks, *self.padding):
            block = block if left is None else torch.cat([left, block], 1)
            frames = (block.size(1) - self.window.numel()) // self.hop + 1
            if frames > 0:
                highest = self.levels(block).amax((1, 2), keepdim=True)
                found = highest if found is None else torch.maximum(found, highest)
                block = block[:, frames * self.hop :]
            left = block
        return found


def _between(blocks: Iterable[Tensor], before: int, after: int) -> Iterable[Tensor]:
    """The blocks in float32 or float64, with zeros before the first and after the last."""
    first = True
    for block in blocks:
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        yield F.pad(block, (before if first else 0, 0))
        first, zeros = False, block.new_zeros(block.size(0), after)
    if not first:
        yield zeros
