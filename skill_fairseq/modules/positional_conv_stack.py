"""data2vec's positional embedding: several short convolutions instead of a long one."""

from __future__ import annotations

import contextlib
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.fake_quantize import InputRange, fake_quantize_weight


class PositionalConvLayer(nn.Module):
    """Grouped convolution over time, LayerNorm without parameters, GELU.

    Args:
        embed_dim: D, features.
        kernel_size: K, frames.
        groups: convolution groups.

    Attributes:
        input_range: rounds what comes in, where the encoder is quantised, as the weight then is; or None.
    """

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.input_range: Optional[InputRange] = None
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim // groups, kernel_size))
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        nn.init.normal_(self.weight, std=math.sqrt(4 / (kernel_size * embed_dim)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T) frames to (B, D, T)."""
        kernel_size = self.weight.size(-1)
        on_cpu = x.device.type == "cpu"
        # float32 on CPUs: oneDNN's grouped convolution is wrong in bfloat16 on processors with AMX (torch 2.13).
        dtype = torch.promote_types(self.weight.dtype, torch.float32) if on_cpu else self.weight.dtype
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            if self.input_range is not None:
                x, weight = self.input_range(x), fake_quantize_weight(weight)
            y = F.conv1d(x.to(dtype), weight, bias, padding=kernel_size // 2, groups=self.groups).to(x.dtype)
        if kernel_size % 2 == 0:  # an even kernel gives one frame too many
            y = y[..., :-1]
        y = F.layer_norm(y.transpose(1, 2), y.shape[1:2])
        return F.gelu(y).transpose(1, 2)


class PositionalConvStack(nn.Module):
    """data2vec's positional embedding (Baevski et al. 2022, arXiv 2202.03555): ``depth`` consecutive layers.

    After the first layer, frames beyond an utterance's end are no longer zero and affect its last frames: in data2vec,
    features depend on the amount of padding.

    Args:
        embed_dim: D, features.
        kernel_size: K, frames, of every layer.
        groups: convolution groups.
        depth: number of layers.
    """

    def __init__(self, embed_dim: int, kernel_size: int, groups: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PositionalConvLayer(embed_dim, kernel_size, groups) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) frames to (B, T, D) position embeddings."""
        y = x.transpose(1, 2)
        for layer in self.layers:
            y = layer(y)
        return y.transpose(1, 2)
