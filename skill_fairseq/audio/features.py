"""Log-mel filter banks and MFCCs with Kaldi's conventions, as in HuBERT's first k-means iteration.

Frames are cut without padding; from each the mean is subtracted, then come pre-emphasis of 0.97, Povey's window, and
the power spectrum through triangular filters, equally spaced in mel = 1127 ln(1 + f / 700) from 20 Hz to half the
sample rate. There is no dither and no energy term (Kaldi's `--dither=0 --use-energy=false`).
"""

from __future__ import annotations

import math

import torch
from scipy.fft import dct
from torch import Tensor

from skill_fairseq.modules.log_mel import mel_filters

PRE_EMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's floor under the logarithm
LIFTER = 22.0


def log_mel(
    wave: Tensor, sample_rate: int = 16000, n_mels: int = 80, window_ms: float = 25.0, hop_ms: float = 10.0
) -> Tensor:
    """Logarithm of mel-filtered power.

    Args:
        wave: (N,) samples.
        sample_rate: Hz.
        n_mels: number of filters.
        window_ms, hop_ms: frame length and step in milliseconds.

    Returns:
        (T, n_mels) float32, T = 1 + (N - window) // hop.

    Raises:
        ValueError: `wave` is not one channel, or shorter than one window.
    """
    window, hop = round(sample_rate * window_ms / 1000), round(sample_rate * hop_ms / 1000)
    if wave.dim() != 1:
        raise ValueError(f"wave: shape {tuple(wave.shape)}, expected (N,); pass one recording of one channel")
    if wave.numel() < window:
        raise ValueError(f"wave: {wave.numel()} samples, expected at least one window of {window}; remove it or pad it")
    frames = wave.float().unfold(0, window, hop)
    frames = frames - frames.mean(dim=1, keepdim=True)
    previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = (frames - PRE_EMPHASIS * previous) * _povey_window(window).to(wave.device)
    n_fft = 1 << (window - 1).bit_length()
    power = torch.fft.rfft(frames, n=n_fft).abs().square()
    return (power @ mel_filters(n_fft, sample_rate, n_mels).to(wave.device)).clamp_min(FLOOR).log()


def mfcc(
    wave: Tensor,
    sample_rate: int = 16000,
    n_cepstra: int = 13,
    n_mels: int = 23,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
) -> Tensor:
    """Mel-frequency cepstra with first and second differences.

    The cepstra are the orthonormal DCT-II of the log-mel energies, liftered by 1 + 11 sin(pi n / 22); differences are
    regressions over two frames on each side, with repeated edges.

    Args:
        wave: (N,) samples.
        sample_rate: Hz.
        n_cepstra: number of cepstra, including the zeroth.
        n_mels: number of filters.
        window_ms, hop_ms: frame length and step in milliseconds.

    Returns:
        (T, 3 * n_cepstra) float32: cepstra, differences, differences of differences.

    Raises:
        ValueError: see `log_mel`, or there are more cepstra than filters.
    """
    if not 0 < n_cepstra <= n_mels:
        raise ValueError(f"n_cepstra: {n_cepstra}, expected 1 to n_mels = {n_mels}; lower it or raise n_mels")
    energies = log_mel(wave, sample_rate, n_mels, window_ms, hop_ms)
    cepstra = torch.from_numpy(dct(energies.cpu().numpy(), type=2, norm="ortho")[:, :n_cepstra]).to(wave.device)
    order = torch.arange(n_cepstra, device=wave.device)
    cepstra = cepstra * (1 + LIFTER / 2 * torch.sin(math.pi * order / LIFTER))
    first = deltas(cepstra)
    return torch.cat([cepstra, first, deltas(first)], dim=1)


def deltas(features: Tensor, reach: int = 2) -> Tensor:
    """Slope of the regression line through `reach` frames on each side, with repeated edges; (T, D) to (T, D)."""
    first, last = features[:1].expand(reach, -1), features[-1:].expand(reach, -1)
    slopes = torch.arange(-reach, reach + 1, dtype=features.dtype, device=features.device)
    windows = torch.cat([first, features, last]).unfold(0, 2 * reach + 1, 1)  # (T, D, 2 reach + 1)
    return (windows @ slopes) / slopes.square().sum()


def _povey_window(length: int) -> Tensor:
    return torch.hann_window(length, periodic=False, dtype=torch.float64).pow(0.85).float()
