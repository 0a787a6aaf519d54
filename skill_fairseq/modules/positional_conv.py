"""Convolutional positional embedding of wav2vec 2.0 with weight normalisation."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.fake_quantize import InputRange, fake_quantize_weight
from skill_fairseq.modules.fft_conv import fft_conv, kernel_spectrum
from skill_fairseq.modules.prepared import Prepared


class PositionalConv(Prepared):
    """Grouped convolution over time, weight-normalised along the kernel axis, then GELU.

    The weight norm is two plain parameters, ``weight_g`` (1, 1, K) and ``weight_v`` (D, D / groups, K), named as in
    published checkpoints, so that any torch version reads them. It is never pruned. On a CPU it uses Fourier
    transforms, which agree with the plain convolution to float rounding. Lower precision also computes in float32
    there, because oneDNN's grouped convolution is wrong in bfloat16 on processors with AMX (torch 2.13).

    Args:
        embed_dim: D, features.
        kernel_size: K, frames.
        groups: convolution groups.

    Attributes:
        input_range: rounds what comes in, where the encoder is quantised, as the kernel then is; or None.
    """

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.input_range: Optional[InputRange] = None
        self.weight_v = nn.Parameter(torch.empty(embed_dim, embed_dim // groups, kernel_size))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        nn.init.normal_(self.weight_v, std=math.sqrt(4 / (kernel_size * embed_dim)))
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    def weight(self) -> Tensor:
        """The effective kernel, (D, D / groups, K)."""
        # At least float32, to round only once and avoid overflow.
        dtype = torch.promote_types(self.weight_v.dtype, torch.float32)
        v, g = self.weight_v.to(dtype), self.weight_g.to(dtype)
        return (v * (g / v.norm(dim=(0, 1), keepdim=True))).to(self.weight_v.dtype)

    def layout(self) -> Tensor:
        """The kernel's spectrum where Fourier transforms are used, otherwise the effective kernel."""
        with torch.autocast(self.weight_v.device.type, enabled=False):
            weight = self.weight()
            weight = weight if self.input_range is None else fake_quantize_weight(weight)
            if self.weight_v.device.type != "cpu":
                return weight
            return kernel_spectrum(weight.to(torch.promote_types(weight.dtype, torch.float32)), self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) frames to (B, T, D) position embeddings."""
        kernel_size = self.weight_v.size(-1)
        kernel = self.prepared()
        x = x if self.input_range is None else self.input_range(x)
        if kernel.is_complex():
            with torch.autocast(x.device.type, enabled=False):
                wide = torch.promote_types(self.bias.dtype, torch.float32)
                y = F.gelu(fft_conv(x.to(wide), kernel, kernel_size) + self.bias)
            return y.to(self.bias.dtype)
        y = F.conv1d(x.transpose(1, 2), kernel, self.bias, padding=kernel_size // 2, groups=self.groups)
        if kernel_size % 2 == 0:  # an even kernel gives one frame too many
            y = y[..., :-1]
        return F.gelu(y).transpose(1, 2)
