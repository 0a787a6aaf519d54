"""Overlapping windows of frames, to encode audio of any length in constant memory."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig

BLOCK_SECONDS = 60
"""Audio to read at a time for statistics of the whole."""


class Window(NamedTuple):
    """Frames to encode together, of which those in the middle are kept.

    Attributes:
        first, last: encoded frames, without ``last``.
        start, stop: kept frames, without ``stop``.
    """

    first: int
    last: int
    start: int
    stop: int

    @property
    def kept(self) -> slice:
        """Slice of the kept frames among the encoded ones."""
        return slice(self.start - self.first, self.stop - self.first)


def windows(num_frames: int, chunk: int, context: int) -> Iterator[Window]:
    """Consecutive chunks of frames, each with the available context on both sides.

    Args:
        num_frames: frames of the whole.
        chunk: kept frames per window; the last window has the rest.
        context: further frames to encode on each side.
    """
    for start in range(0, num_frames, chunk):
        stop = min(start + chunk, num_frames)
        yield Window(max(start - context, 0), min(stop + context, num_frames), start, stop)


def plan(
    audio: Any, config: EncoderConfig, chunk_seconds: float, context_seconds: float
) -> Iterator[Tuple[Window, Tensor]]:
    """Yields windows over audio, with their samples.

    The convolutions turn the samples into exactly the window's frames, which equal those of the whole if the extractor
    is local. With log-mel features (``mel_bins``) that takes a context of ``mel_padding``, usually one frame.

    Args:
        audio: (N,) samples: a tensor, an array, or anything with a length that can be sliced.
        config: the encoder's shape.
        chunk_seconds, context_seconds: see :func:`windows`; rounded to frames.

    Yields:
        window, and (1, n) samples.

    Raises:
        ValueError: the audio is not (N,) or too short for a frame, the chunk is shorter than a frame, or the context is
            negative.
    """
    samples = check_audio(audio, config)
    per_second = config.sample_rate / config.downsampling
    chunk, context = round(chunk_seconds * per_second), round(context_seconds * per_second)
    if chunk < 1:
        raise ValueError(f"chunk_seconds: {chunk_seconds}; expected at least {1 / per_second:g}, one frame")
    if context < 0:
        raise ValueError(f"context_seconds: {context_seconds}; expected 0 or more")
    num_frames = config.num_output_frames(samples)
    for window in windows(num_frames, chunk, context):
        begin = window.first * config.downsampling
        end = (window.last - 1) * config.downsampling + config.receptive_field
        if window.last == num_frames:  # and the rest, which counts in normalisation over time
            end = samples
        yield window, cut(audio, begin, end)[None]


def cut(audio: Any, begin: int, end: int) -> Tensor:
    """(end - begin,) samples as a tensor; memory-mapped ones are copied."""
    piece = audio[begin:end]
    return piece if isinstance(piece, Tensor) else torch.tensor(piece)


def check_audio(audio: Any, config: EncoderConfig) -> int:
    """The number of samples.

    Raises:
        ValueError: it is not (N,), or too short for a frame.
    """
    shape = tuple(getattr(audio, "shape", (len(audio),)))
    if len(shape) != 1:
        raise ValueError(f"audio: shape {shape}; expected (samples,), one recording of one channel")
    if shape[0] < config.receptive_field:
        raise ValueError(
            f"audio: {shape[0]} samples are too short for one frame; at least {config.receptive_field} are needed"
        )
    return shape[0]
