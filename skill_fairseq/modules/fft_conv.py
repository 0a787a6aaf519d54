"""Grouped convolution over time with a long kernel, through Fourier transforms of overlapping blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_BLOCKS = 64
"""Blocks to transform at a time: 165 s for Base's kernel of 128 frames; spectra take several times the memory of their
input."""


def block_length(kernel_size: int) -> int:
    """Frames of a block: a power of two, about half of which are results. The spectrum grows with it."""
    return 1 << math.ceil(math.log2(2 * kernel_size))


def kernel_spectrum(kernel: Tensor, groups: int) -> Tensor:
    """Spectrum of a grouped ``conv1d`` kernel.

    Args:
        kernel: (D_out, D_in / groups, K) float32 or float64.
        groups: G.

    Returns:
        (n / 2 + 1, G, D_in / G, D_out / G) complex for blocks of n frames, conjugated for correlation.
    """
    size = kernel.size(2)
    n = block_length(size)
    # For few zero-padded points a matrix product is faster than a transform, and gives the needed order.
    time = torch.arange(size, dtype=torch.float64)
    phase = torch.outer(torch.arange(n // 2 + 1, dtype=torch.float64), time) * (2 * math.pi / n)
    basis = torch.cat([phase.cos(), phase.sin()]).to(kernel)
    spectrum = basis @ kernel.reshape(-1, size).t()  # (2 (n / 2 + 1), D_out D_in / G)
    real, imaginary = spectrum.unflatten(1, (groups, -1, kernel.size(1))).chunk(2)
    return torch.complex(real, imaginary).transpose(2, 3)


def fft_conv(x: Tensor, spectrum: Tensor, kernel_size: int) -> Tensor:
    """``conv1d`` of stride 1 with ``kernel_size // 2`` leading zeros and as many output as input frames.

    Args:
        x: (B, T, D) frames.
        spectrum: the kernel's, from :func:`kernel_spectrum`.
        kernel_size: K.

    Returns:
        (B, T, D_out) frames.
    """
    batch, num_frames, dim = x.shape
    groups = spectrum.size(1)
    n = block_length(kernel_size)
    step = n - kernel_size + 1
    blocks = -(-num_frames // step)
    left = kernel_size // 2
    padded = F.pad(x, (0, 0, left, blocks * step + kernel_size - 1 - num_frames - left))
    parts = padded.unfold(1, n, step).split(MOST_BLOCKS, 1)
    frames = [_convolve(part, spectrum, groups)[:, :, :step].flatten(1, 2) for part in parts]
    return (frames[0] if len(frames) == 1 else torch.cat(frames, 1))[:, :num_frames]


def _convolve(blocks: Tensor, spectrum: Tensor, groups: int) -> Tensor:
    """(B, blocks, D, n) frames to (B, blocks, n, D_out), of which the last K - 1 are not results."""
    pieces = torch.fft.rfft(blocks, dim=-1)  # (B, blocks, D, n / 2 + 1)
    pieces = pieces.flatten(0, 1).unflatten(1, (groups, -1)).permute(3, 1, 0, 2)  # (n / 2 + 1, G, B blocks, D / G)
    out = torch.matmul(pieces, spectrum).permute(2, 1, 3, 0).flatten(1, 2)  # (B blocks, D_out, n / 2 + 1)
    frames = torch.fft.irfft(out, n=blocks.size(-1), dim=-1)
    return frames.transpose(1, 2).unflatten(0, blocks.shape[:2])
