"""The convolutional feature extractor, with prunable channels."""

from __future__ import annotations

from typing import Iterable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.activated_conv import activated_conv, compute_dtype
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.fake_quantize import fake_quantize_weight
from skill_fairseq.modules.gate_bank import Draw, HardConcrete
from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.kernels import Product
from skill_fairseq.modules.log_mel import LogMel
from skill_fairseq.modules.low_precision import LowConv
from skill_fairseq.modules.norms import ChannelLayerNorm, Moments, group_norm_by_moments, moments
from skill_fairseq.modules.prepared import Prepared
from skill_fairseq.modules.slicing import take
from skill_fairseq.modules.tf32 import exact_products

Statistics = Union[Moments, Tensor]
"""Of the whole audio: moments of the first convolution's input, or the (B, 1, 1) peak of log-mel levels."""
CHUNK_FRAMES = 256
"""Frames that go through all layers at a time on a CPU without gradients, to stay in its caches."""
MULTIPLE = 8
"""Kernels get their channels padded with zeros to a multiple of this: products of other widths take up to 1.4 times as
long (MKL on Zen 3, 410 channels)."""


class ConvLayer(nn.Module):
    """A convolution's weights, normalisation and gates, for a :class:`ConvStack` to compute with, and a GELU.

    Args:
        in_channels, out_channels: remaining channels.
        full_channels: output channels before pruning.
        kernel_size, stride: in samples of this layer's input.
        bias: whether the convolution has a bias.
        norm: "group" (one group per channel), "layer" (over channels) or None.

    Attributes:
        gate: gate of the output channels, or None.
        rounds: whether the weights are rounded if the encoder is quantised; the inputs are not.
    """

    gate: Optional[HardConcrete] = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        full_channels: int,
        kernel_size: int,
        stride: int,
        bias: bool,
        norm: Optional[str],
    ) -> None:
        super().__init__()
        self.rounds = False
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: Union[None, nn.GroupNorm, ChannelLayerNorm] = None
        if norm == "group":
            self.norm = nn.GroupNorm(out_channels, out_channels)
        elif norm == "layer":
            self.norm = ChannelLayerNorm(out_channels, full_channels)

    def kernel(self, inputs: Optional[Units], outputs: Optional[Units]) -> Tensor:
        """(k, C_in, C_out) weights of the computed units, times the input's gates."""
        weight: Tensor = self.conv.weight
        if self.rounds:
            weight = fake_quantize_weight(weight)
        weight = take(weight, 0, None if outputs is None else outputs.indices)
        if inputs is not None:
            weight = take(weight, 1, inputs.indices) * inputs.gate.to(weight.dtype)[:, None]
        return weight.permute(2, 1, 0)

    def bias(self, outputs: Optional[Units]) -> Optional[Tensor]:
        """(C_out,) bias of the computed units, or None."""
        bias = self.conv.bias
        return bias if bias is None or outputs is None else take(bias, 0, outputs.indices)


class ConvStack(Prepared):
    """Waveform to frames.

    Args:
        config: shape; uses the conv fields, ``mel_bins`` and ``extractor_mode``. With log-mel features, which do not
            depend on the gain, there is no GroupNorm.

    Attributes:
        bf16: whether the convolutions after the first multiply in bfloat16, if prepared and without gradients, see
            :func:`skill_fairseq.modules.low_precision.lower`.
    """

    bf16 = False

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        assert config.conv_channels is not None
        self.log_mel = LogMel(config) if config.mel_bins else None
        layers = []
        in_channels = config.mel_bins or 1
        for i, (full, kernel_size, stride) in enumerate(config.conv_feature_layers):
            if config.extractor_mode == "layer_norm":
                norm: Optional[str] = "layer"
            else:
                norm = "group" if i == 0 and not config.mel_bins else None
            layers.append(
                ConvLayer(
                    in_channels,
                    config.conv_channels[i],
                    full,
                    kernel_size,
                    stride,
                    config.conv_bias,
                    norm,
                )
            )
            in_channels = config.conv_channels[i]
        self.layers: Sequence[ConvLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.config = config
        # A kept channel's soft gate folds into the next convolution. The last one may precede a LayerNorm, into which
        # it cannot fold, so that gate stays as a constant.
        self.register_buffer("scale", torch.ones(in_channels))
        self.scale: Tensor

    def prepare(self, kernels: str = "plain") -> None:
        """Lays out the weights for the allowed kernels."""
        super().prepare(kernels)
        assert self._prepared is not None
        layout = self._prepared[1]
        parts = []
        for kernel, layer in zip(layout[1:], self.layers[1:]):
            bias = layer.bias(None)
            # Zeros stay zeros through a GELU, but count in a LayerNorm; plain products keep their bits.
            if kernels != "plain" and not any(isinstance(each.norm, ChannelLayerNorm) for each in self.layers):
                inputs, outputs = (-width % MULTIPLE for width in kernel.shape[1:])
                kernel = F.pad(kernel, (0, outputs, 0, inputs))
                bias = None if bias is None else F.pad(bias.detach(), (0, outputs))
            parts.append((kernel, bias, layer.conv.stride[0]))
        self._products = layout, [LowConv(*part) if self.bf16 else Product(*part, kernels) for part in parts]

    @property
    def gated(self) -> bool:
        """Whether channels have gates."""
        return any(layer.gate is not None for layer in self.layers)

    def forward(
        self, source: Tensor, draw: Optional[Draw] = None, statistics: Optional[Statistics] = None
    ) -> Tuple[Tensor, Optional[Units]]:
        """Args:
            source: (B, N) samples, float32 for best results at any precision of the weights.
            draw: the gates of this forward, or None.
            statistics: the result of :meth:`statistics` if the source is a part of longer audio; None: its own.

        Returns:
            (B, T, C) frames, and their channels with gates, or None without gates.
        """
        units = [None if draw is None else draw.of(layer.gate) for layer in self.layers]
        kernels = self._kernels(units) if self.gated else self.prepared()
        num_frames = self.config.num_frames(source.size(1))
        source = source.to(torch.promote_types(source.dtype, torch.float32))
        if self.log_mel is not None:
            source = self.log_mel(source, statistics if isinstance(statistics, Tensor) else None).flatten(1)
        samples = source.size(1)
        first = self.layers[0].conv
        size, stride = first.kernel_size[0] * first.in_channels, first.stride[0] * first.in_channels
        # Pads to whole hops, so that every layer strides over whole blocks, plus the excess of the last window. Frames
        # that cover padding are cut off at the end.
        hop = self.config.conv_downsampling * first.in_channels
        padding = -samples % hop + (-(-size // stride) - 1) * stride
        windows = F.pad(source, (0, padding)).unfold(1, size, stride)
        kernel, shift = self._first_kernel(windows, samples, kernels[0], units[0], statistics)
        if torch.is_grad_enabled() or source.device.type != "cpu":
            x = self._encode(windows, kernel, shift, kernels, units)[:, :num_frames]
        else:
            x = self._encode_in_chunks(windows, kernel, shift, kernels, units, num_frames)
        last = units[-1]
        scale = self.scale if last is None else take(self.scale, 0, last.indices) * last.gate
        return x * scale.to(x.dtype), last

    def statistics(self, blocks: Iterable[Tensor]) -> Optional[Statistics]:
        """Statistics of the whole audio for a GroupNorm over time or log-mel features; None if there is neither.

        Args:
            blocks: consecutive (B, n) samples.
        """
        if self.log_mel is not None:
            return self.log_mel.peak(blocks)
        first = self.layers[0]
        if not isinstance(first.norm, nn.GroupNorm):
            return None
        size, stride = first.conv.kernel_size[0], first.conv.stride[0]
        found, left = None, None
        for block in blocks:
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            block = block if left is None else torch.cat([left, block], 1)
            if block.size(1) >= size:
                part = moments(block.unfold(1, size, stride))
                found = part if found is None else found.joined(part)
                block = block[:, part.frames * stride :]
            left = block
        return found

    def layout(self) -> List[Tensor]:
        """Kernels (k, C_in, C_out) of a stack without gates."""
        return self._kernels([None] * len(self.layers))

    def _kernels(self, units: Sequence[Optional[Units]]) -> List[Tensor]:
        inputs = [None, *units[:-1]]
        return [layer.kernel(i, o).contiguous() for layer, i, o in zip(self.layers, inputs, units)]

    def _first_kernel(
        self,
        windows: Tensor,
        samples: int,
        kernel: Tensor,
        units: Optional[Units],
        statistics: Optional[Statistics],
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Kernel (B, k C_in, C) and bias (B, 1, C) or None of the first layer with its GroupNorm folded in; like
        ``windows``."""
        layer = self.layers[0]
        bias, kernel = layer.bias(units), kernel.flatten(0, 1)
        if not isinstance(layer.norm, nn.GroupNorm):
            batch = windows.size(0)
            shift = None if bias is None else bias.to(windows.dtype).expand(batch, 1, -1)
            return kernel.to(windows.dtype).expand(batch, -1, -1), shift
        if not isinstance(statistics, Moments):
            valid = (samples - kernel.size(0)) // layer.conv.stride[0] + 1
            statistics = moments(windows[:, :valid])
        index = None if units is None else units.indices
        scale, shift = group_norm_by_moments(
            statistics,
            kernel,
            bias,
            take(layer.norm.weight, 0, index),
            take(layer.norm.bias, 0, index),
            layer.norm.eps,
        )
        return (kernel * scale).to(windows.dtype), shift.to(windows.dtype)

    def _encode(
        self,
        windows: Tensor,
        kernel: Tensor,
        shift: Optional[Tensor],
        kernels: Sequence[Tensor],
        units: Sequence[Optional[Units]],
    ) -> Tensor:
        """(B, T_1, k) windows to (B, T, C) frames before the last gate."""
        batch, channels = windows.size(0), kernels[-1].size(2)
        dtype = compute_dtype(self.layers[0].conv.weight)
        products = self._usable_products(kernels, windows.device, dtype)
        if products:
            padding = products[0].weight.size(1) - kernel.size(2)
            kernel = F.pad(kernel, (0, padding))
            shift = None if shift is None else F.pad(shift, (0, padding))
        # A constant or hum in the audio cancels between taps and in the shift; 8 or 11 bits would leave noise.
        with torch.autocast(windows.device.type, enabled=False), exact_products(windows.device):
            x = torch.bmm(windows, kernel) if shift is None else torch.baddbmm(shift, windows, kernel)
        x = x.flatten(0, 1).to(dtype)  # utterances are concatenated
        if products:
            return self._multiply(x, products)[:, :channels].unflatten(0, (batch, -1))  # type: ignore[no-any-return]
        for i, layer in enumerate(self.layers):
            if i:
                x = activated_conv(x, kernels[i], layer.bias(units[i]), layer.conv.stride[0])
            if isinstance(layer.norm, ChannelLayerNorm):
                x = layer.norm(x, units[i])
        return F.gelu(x).unflatten(0, (batch, -1))  # type: ignore[arg-type]

    def _usable_products(
        self, kernels: Sequence[Tensor], device: torch.device, dtype: torch.dtype
    ) -> Optional[List[Product]]:
        """The prepared products, if they are of these kernels and no gradient is needed."""
        if self._products is None or self._products[0] is not kernels or torch.is_grad_enabled():
            return None
        return self._products[1] if device.type == "cpu" and dtype == kernels[0].dtype else None

    def _multiply(self, x: Tensor, products: Sequence[Product]) -> Tensor:
        """(N, C) frames of the first layer to (N / strides, C) of the last, without gradients and gates."""
        x = self._normalise_and_activate(0, x, len(x))
        for i, product in enumerate(products, start=1):
            x = self._normalise_and_activate(i, product(x), len(x) // product.stride)
        return x

    def _normalise_and_activate(self, i: int, x: Tensor, rows: int) -> Tensor:
        """Keeps the memory of ``x`` if it has enough rows; otherwise appends zeros."""
        norm = self.layers[i].norm
        x = norm(x) if isinstance(norm, ChannelLayerNorm) else x
        y = x if len(x) == rows else x.new_zeros(rows, x.size(1))
        torch.ops.aten.gelu.out(x, out=y[: len(x)])
        return y

    def _encode_in_chunks(
        self,
        windows: Tensor,
        kernel: Tensor,
        shift: Optional[Tensor],
        kernels: Sequence[Tensor],
        units: Sequence[Optional[Units]],
        num_frames: int,
    ) -> Tensor:
        """Like :meth:`_encode`, but in pieces that fit into the processor's cache."""
        hop = self.config.conv_downsampling
        overlap = -(-self.config.conv_receptive_field // hop) - 1
        per_frame = hop // self.layers[0].conv.stride[0]
        together = max(1, CHUNK_FRAMES // num_frames)  # short utterances share a chunk
        utterances = []
        for b in range(0, windows.size(0), together):
            own = slice(b, b + together)
            moved = None if shift is None else shift[own]
            pieces = []
            for start in range(0, num_frames, CHUNK_FRAMES):
                stop = min(start + CHUNK_FRAMES, num_frames)
                piece = windows[own, start * per_frame : (stop + overlap) * per_frame]
                pieces.append(self._encode(piece, kernel[own], moved, kernels, units)[:, : stop - start])
            utterances.append(torch.cat(pieces, 1))
        return torch.cat(utterances)
