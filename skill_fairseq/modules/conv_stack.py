"""The convolutional feature extractor, channel by channel prunable."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.hard_concrete import HardConcrete
from skill_fairseq.modules.norms import ChannelLayerNorm


class ConvLayer(nn.Module):
    """Convolution, normalisation, GELU, gate.

    Args:
        in_channels, out_channels: channels that are left.
        full_channels: output channels before pruning.
        kernel_size, stride: in samples of this layer's input.
        bias: whether the convolution has a bias.
        norm: "group" (one group a channel), "layer" (over channels) or None.
        gated: put a hard-concrete gate on every output channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        full_channels: int,
        kernel_size: int,
        stride: int,
        bias: bool,
        norm: Optional[str],
        gated: bool,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: Union[None, nn.GroupNorm, ChannelLayerNorm] = None
        if norm == "group":
            self.norm = nn.GroupNorm(out_channels, out_channels)
        elif norm == "layer":
            self.norm = ChannelLayerNorm(out_channels, full_channels)
        self.gate = HardConcrete(out_channels) if gated else None

    def forward(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Args:
            x: (B, C_in, T_in).

        Returns:
            (B, C_out, T_out), and (C_out,) 1 where a channel's gate is open, or None without gates.
        """
        x = self.conv(x)
        z = present = None
        if self.gate is not None:
            z = self.gate().to(x.dtype)
            present = (z > 0).to(x.dtype)
        if isinstance(self.norm, ChannelLayerNorm):
            x = self.norm(x.transpose(1, 2), present).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x)
        x = F.gelu(x)
        return (x if z is None else x * z[:, None]), present


class ConvStack(nn.Module):
    """Waveform to frames.

    Args:
        config: shape; uses the conv fields and ``extractor_mode``.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        assert config.conv_channels is not None
        layers = []
        in_channels = 1
        for i, (full, kernel_size, stride) in enumerate(config.conv_feature_layers):
            if config.extractor_mode == "layer_norm":
                norm: Optional[str] = "layer"
            else:
                norm = "group" if i == 0 else None
            layers.append(
                ConvLayer(
                    in_channels,
                    config.conv_channels[i],
                    full,
                    kernel_size,
                    stride,
                    config.conv_bias,
                    norm,
                    "conv" in config.pruning_units,
                )
            )
            in_channels = config.conv_channels[i]
        self.layers: Sequence[ConvLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        # A kept channel's soft gate folds into the next convolution. After the last one comes a LayerNorm, which it
        # cannot pass, so that gate stays: as a constant, not as a parameter.
        self.register_buffer("scale", torch.ones(in_channels))
        self.scale: Tensor

    def forward(self, source: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Args:
            source: (B, N) samples.

        Returns:
            (B, T, C) frames, and (C,) 1 where a channel's gate is open, or None without gates.

        Raises:
            ValueError: the audio is too short for one frame.
        """
        x, present = source.unsqueeze(1), None
        for layer in self.layers:
            x, present = layer(x)
        return x.transpose(1, 2) * self.scale.to(x.dtype), present
