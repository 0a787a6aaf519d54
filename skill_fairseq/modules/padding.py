"""Padding masks of samples: checks, and conversion to frames."""

from __future__ import annotations

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig

EXPECTED = "bool, True = padding, at the end of each row; with transformers' attention_mask, attention_mask == 0"


def exporting() -> bool:
    """Whether torch is recording the model for ``torch.export``, ONNX or TorchScript."""
    compiler = getattr(torch, "compiler", None)
    is_exporting = getattr(compiler, "is_exporting", None)
    return bool(
        (is_exporting is not None and is_exporting()) or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
    )


def check_padding_mask(padding_mask: Tensor, source: Tensor, values: bool = True) -> Tensor:
    """Checks a mask before encoding.

    Args:
        padding_mask: (B, N) bool, True = padding, at the end of each row.
        source: (B, N) samples.
        values: also check the values, for which the host waits for a GPU. A graph never does.

    Returns:
        the mask; a graph compares it with the source, so that a wrong shape is an error there too.

    Raises:
        TypeError: it is not a bool tensor.
        ValueError: it has another shape, a row is all padding, or audio follows padding, as in a mask where True means
            audio.
    """
    shape = tuple(getattr(padding_mask, "shape", ()))
    found = getattr(padding_mask, "dtype", type(padding_mask).__name__)
    if found != torch.bool:
        raise TypeError(f"padding_mask: {found} of shape {shape}; expected {EXPECTED}")
    if shape != tuple(source.shape):
        raise ValueError(f"padding_mask: shape {shape} for source {tuple(source.shape)}; expected {EXPECTED}")
    if exporting():
        # A recorded program accepts any dtype, so 0 and 1 work like False and True.
        return padding_mask != torch.zeros_like(source, dtype=torch.bool)
    if values:
        broken = padding_mask[:, 0] | (padding_mask[:, :-1] & ~padding_mask[:, 1:]).any(1)
        if broken.any():
            row = int(broken.int().argmax())
            what = "starts with padding" if padding_mask[row, 0] else "has audio after padding"
            raise ValueError(f"padding_mask: row {row} {what}; expected {EXPECTED}")
    return padding_mask


def padding_of_attention_mask(attention_mask: Tensor, source: Tensor) -> Tensor:
    """Converts transformers' mask (B, N), 1 = audio and 0 = padding, to the encoder's, (B, N) bool.

    Raises:
        ValueError: it has another shape than the source (B, N), or values other than 0 and 1 (which a graph does not
            check).
    """
    expected = "expected (batch, samples) of 1 for audio and 0 for padding, at the end of each row"
    if attention_mask.shape != source.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} for input_values {tuple(source.shape)}; {expected}"
        )
    padding = attention_mask == 0
    if not exporting() and not (padding | (attention_mask == 1)).all():
        raise ValueError(f"attention_mask: {attention_mask.dtype} with values other than 0 and 1; {expected}")
    return padding


def reduce_padding_mask(padding_mask: Tensor, config: EncoderConfig) -> Tensor:
    """(B, T) bool of the convolutions' frames to the output's: a merged frame is padding if any of its frames is."""
    rate = config.time_reduction
    if rate == 1:
        return padding_mask
    return padding_mask[:, : padding_mask.size(1) // rate * rate].unflatten(1, (-1, rate)).any(-1)


def frame_padding_mask(padding_mask: Tensor, num_frames: int, config: EncoderConfig) -> Tensor:
    """Padding of frames from padding of samples.

    Rule "chunks" (Microsoft's and fairseq's): the samples are cut into ``num_frames`` equal chunks, and a frame is
    padding if its whole chunk is. Rule "convolution" (transformers'): a frame counts if the conv stack would produce it
    from the unpadded audio, sometimes one frame less.

    Args:
        padding_mask: (B, N) bool, True = padding, at the end of each row.
        num_frames: T.

    Returns:
        (B, T) bool.
    """
    if config.padding_rule == "chunks" and not exporting():
        usable = padding_mask.size(1) - padding_mask.size(1) % num_frames
        return padding_mask[:, :usable].unflatten(1, (num_frames, -1)).all(-1)
    lengths = (~padding_mask).sum(1)
    frames = torch.arange(num_frames, device=padding_mask.device)
    if config.padding_rule == "chunks":  # the same for padding at the end, without a shape that depends on N
        return frames * (padding_mask.size(1) // num_frames) >= lengths[:, None]
    return frames >= config.num_frames(lengths)[:, None]
