"""Records an encoder with torch.export, for any batch size and length; shared by all graph formats."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.conv_stack import ConvStack
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import fake_quantize_weight
from skill_fairseq.modules.log_mel import FLOOR, LogMel, scaled
from skill_fairseq.modules.positional_conv import PositionalConv
from skill_fairseq.modules.relative_position import RelativePosition

NEEDED_TORCH = (2, 6)
"""The oldest torch whose torch.export and torch.onnx support dynamic dimensions in the form used here."""

INFO_NAME = "skill_fairseq.json"
"""Key of the encoder's shape and provenance in a graph."""


class FoldedPositionalConv(nn.Module):
    """The positional convolution with a precomputed weight norm: quantisers need a constant weight.

    Args:
        conv: not modified.
    """

    def __init__(self, conv: PositionalConv) -> None:
        super().__init__()
        dim, _, kernel_size = conv.weight_v.shape
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=conv.groups)
        self.input_range = conv.input_range
        with torch.no_grad():
            weight = conv.weight()
            self.conv.weight.copy_(weight if self.input_range is None else fake_quantize_weight(weight))
            self.conv.bias.copy_(conv.bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) frames to (B, T, D) position embeddings."""
        x = x if self.input_range is None else self.input_range(x)
        y = self.conv(x.transpose(1, 2))
        if self.conv.kernel_size[0] % 2 == 0:  # an even kernel gives one frame too many
            y = y[..., :-1]
        return F.gelu(y).transpose(1, 2)


class SpectrumByProducts(nn.Module):
    """Log-mel features with the spectrum as a convolution with windowed sines and cosines, which every runtime has.

    Args:
        log_mel: left unchanged.
    """

    def __init__(self, log_mel: LogMel) -> None:
        super().__init__()
        size = log_mel.window.numel()
        self.padding = log_mel.padding
        angles = torch.arange(size, dtype=torch.float64) * torch.arange(size // 2 + 1)[:, None] * (2 * math.pi / size)
        waves = torch.cat([angles.cos(), angles.sin()]) * log_mel.window.double()
        self.conv = nn.Conv1d(1, len(waves), size, stride=log_mel.hop, bias=False)
        self.conv.weight = nn.Parameter(waves.float().unsqueeze(1), requires_grad=False)
        self.register_buffer("filters", log_mel.filters)
        self.filters: Tensor

    def forward(self, source: Tensor) -> Tensor:
        """(B, N) samples to (B, M, T) features in [-1, 1]."""
        waves = self.conv(F.pad(source, self.padding).unsqueeze(1)).transpose(1, 2)
        real, imaginary = waves.square().chunk(2, 2)
        levels = ((real + imaginary) @ self.filters).clamp_min(FLOOR).log10()
        return scaled(levels).transpose(1, 2)


class StepwiseConvStack(nn.Module):
    """Runs the convolutions one after another on whole utterances, as graphs of any length need.

    Args:
        stack: a stack without gates, whose weights are shared.
    """

    def __init__(self, stack: ConvStack) -> None:
        super().__init__()
        self.log_mel = None if stack.log_mel is None else SpectrumByProducts(stack.log_mel)
        self.layers = stack.layers
        self.register_buffer("scale", stack.scale)
        self.scale: Tensor

    def forward(self, source: Tensor, draw: None = None, statistics: None = None) -> tuple[Tensor, None]:
        """(B, N) samples to (B, T, C) frames, and None for gates."""
        x = source.unsqueeze(1) if self.log_mel is None else self.log_mel(source)
        for layer in self.layers:
            if layer.rounds:
                x = F.conv1d(x, fake_quantize_weight(layer.conv.weight), layer.conv.bias, layer.conv.stride)
            else:  # by the module, whose name the node gets
                x = layer.conv(x)
            if isinstance(layer.norm, nn.GroupNorm):
                x = layer.norm(x)
            elif layer.norm is not None:
                x = layer.norm(x.transpose(1, 2)).transpose(1, 2)
            x = F.gelu(x)
        return x.transpose(1, 2) * self.scale, None


class PositionMatrix(nn.Module):
    """Position bias for every pair of frames, computed once for all layers, because gathering is slow.

    Args:
        position: a module whose weights are shared.
    """

    def __init__(self, position: RelativePosition) -> None:
        super().__init__()
        self.position = position

    def forward(self, num_frames: int) -> Tensor:
        """(H, T, T) bias, [h, i, j] for query i and key j."""
        frames = torch.arange(num_frames, device=self.position.weight.device)
        entries = frames[:, None] + (num_frames - 1 - frames)
        return self.position(num_frames).index_select(1, entries.flatten()).unflatten(1, (num_frames, num_frames))


def attend_by_matrix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor],
    bias: Optional[Tensor],
    padding_mask: Optional[Tensor],
    dropout: float,
) -> Tensor:
    """:func:`skill_fairseq.modules.attention_core.attend` for graphs of any length, with :class:`PositionMatrix`."""
    return attend_by_matrix_with_maps(q, k, v, factor, bias, padding_mask, dropout)[0]


def attend_by_matrix_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Optional[Tensor],
    bias: Optional[Tensor],
    padding_mask: Optional[Tensor],
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The same, with the (B, h, T, T) maps."""
    scores = q @ k.transpose(2, 3) * q.size(3) ** -0.5
    if factor is not None and bias is not None:
        scores = scores + factor * bias
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2), weights


class States(nn.Module):
    """The encoder with tensors as inputs and a dictionary of tensors as output, as graphs need.

    Args:
        encoder: without gates.
        layers: layers whose states to return; None: all of them, and the output ``x``. Without ``x`` nothing beyond the
            deepest layer runs; an empty list means only ``x``.
    """

    def __init__(self, encoder: SpeechEncoder, layers: Optional[Sequence[int]] = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = layers

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> dict[str, Any]:
        """Encodes a batch.

        Args:
            source: (B, N) samples, normalised if the encoder expects it.
            padding_mask: (B, N) bool, True = padding, at the end of each row; or None.

        Returns:
            ``x`` (B, T, D) if requested; ``hidden_states``, a tensor (B, T, D) for each requested layer; with a mask,
            ``padding_mask`` (B, T) bool.
        """
        out = self.encoder(source, padding_mask, last_layer=max(self.layers) if self.layers else None)
        found: dict[str, Any] = {} if self.layers else {"x": out.x}
        every = range(len(out.hidden_states))
        found["hidden_states"] = [out.hidden_states[i] for i in (every if self.layers is None else self.layers)]
        return found if padding_mask is None else {**found, "padding_mask": out.padding_mask}


def check_torch() -> None:
    """Checks that torch can record an encoder.

    Raises:
        ValueError: it is too old.
    """
    found = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    if found < NEEDED_TORCH:
        raise ValueError(
            f"torch {torch.__version__} cannot record this encoder; torch >= {'.'.join(map(str, NEEDED_TORCH))} "
            "is needed: export with a newer torch"
        )


def record(
    encoder: SpeechEncoder,
    padding_mask: bool = False,
    layers: Optional[Sequence[int]] = None,
    samples: Optional[int] = None,
) -> torch.export.ExportedProgram:
    """Records the encoder with torch.export.

    Args:
        encoder: not modified.
        padding_mask: add a second input for the padding.
        layers: see :class:`States`.
        samples: fixes the input to (1, samples); None: batch size and length stay free.

    Raises:
        ValueError: torch is too old, the encoder has gates, or there are too few samples for a frame.
    """
    check_torch()
    if encoder.config.pruning_units:
        raise ValueError(
            f"the encoder has gates ({', '.join(encoder.config.pruning_units)}), which a graph "
            "cannot hold; shrink it first: skill-shrink CHECKPOINT shrunk.safetensors"
        )
    # The graph keeps nothing of the example, but sizes of 0 and 1 would be specialised.
    shape = (2, encoder.config.receptive_field + 20 * encoder.config.downsampling + 7)
    source = torch.zeros(shape if samples is None else (1, samples))
    inputs: tuple[Tensor, ...] = (source,)
    if padding_mask:
        inputs += (torch.arange(source.size(1)).expand(source.size(0), -1) >= source.size(1) // 2,)
    open_sizes = None if samples is not None else {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = States(copy.deepcopy(encoder).cpu().float(), layers).eval()
    transformer = model.encoder.transformer
    model.encoder.feature_extractor = StepwiseConvStack(model.encoder.feature_extractor)  # type: ignore[assignment]
    for layer in transformer.layers:
        if layer.attention is not None:
            layer.attention.attend = attend_by_matrix  # type: ignore[method-assign]
            layer.attention.attend_with_maps = attend_by_matrix_with_maps  # type: ignore[assignment]
    if isinstance(transformer.pos_conv, PositionalConv):
        transformer.pos_conv = FoldedPositionalConv(transformer.pos_conv)  # type: ignore[assignment]
    if transformer.relative_position is not None:
        transformer.relative_position = PositionMatrix(transformer.relative_position)  # type: ignore[assignment]
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=(open_sizes,) * len(inputs), strict=False)
    _forget_sources(program)
    return program


def _forget_sources(program: torch.export.ExportedProgram) -> None:
    """Removes stack traces, which hold paths of this machine, from all operations."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for name in ("stack_trace", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(name, None)


def describe_graph(encoder: SpeechEncoder, provenance: Mapping[str, Any], **facts: Any) -> str:
    """JSON for a graph's :data:`INFO_NAME`: the encoder's shape, provenance, and facts."""
    return json.dumps({"config": encoder.config.to_dict(), "provenance": dict(provenance), **facts})
