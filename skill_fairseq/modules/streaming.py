"""Audio of any length in memory that does not grow with it: windows of frames that overlap."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig

BLOCK_SECONDS = 60
"""Audio that statistics of the whole are taken from at a time."""


class Window(NamedTuple):
    """Frames that are encoded together, of which those in the middle are kept.

    Attributes:
        first, last: encoded, ``last`` not among them.
        start, stop: kept, ``stop`` not among them.
    """

    first: int
    last: int
    start: int
    stop: int

    @property
    def kept(self) -> slice:
        """Where the kept frames stand among the encoded ones."""
        return slice(self.start - self.first, self.stop - self.first)


def windows(num_frames: int, chunk: int, context: int) -> Iterator[Window]:
    """Chunks of frames, one after another, each with the context that there is on either side.

    Args:
        num_frames: of the whole.
        chunk: frames that a window keeps; the last one has what is left.
        context: frames that are encoded beyond those on either side.
    """
    for start in range(0, num_frames, chunk):
        stop = min(start + chunk, num_frames)
        yield Window(max(start - context, 0), min(stop + context, num_frames), start, stop)


def plan(
    audio: Any, config: EncoderConfig, chunk_seconds: float, context_seconds: float
) -> Iterator[Tuple[Window, Tensor]]:
    """Windows over audio, and the samples of each.

    The samples are those that the convolutions make just the window's frames of: a window of an extractor that is local
    has the very frames of the whole.

    Args:
        audio: (N,) samples: a tensor, an array, or anything that has a length and can be sliced.
        config: the encoder's shape.
        chunk_seconds, context_seconds: see :func:`windows`; rounded to frames.

    Yields:
        window, and (1, n) samples.

    Raises:
        ValueError: the audio is not (N,) or too short for a frame, or the chunk is not a frame long, or the context is
            negative.
    """
    samples = check_audio(audio, config)
    per_second = config.sample_rate / config.downsampling
    chunk, context = round(chunk_seconds * per_second), round(context_seconds * per_second)
    if chunk < 1:
        raise ValueError(f"chunk_seconds: {chunk_seconds}; expected at least {1 / per_second:g}, one frame")
    if context < 0:
        raise ValueError(f"context_seconds: {context_seconds}; expected 0 or more")
    for window in windows(config.num_output_frames(samples), chunk, context):
        begin = window.first * config.downsampling
        end = (window.last - 1) * config.downsampling + config.receptive_field
        yield window, cut(audio, begin, end)[None]


def cut(audio: Any, begin: int, end: int) -> Tensor:
    """(end - begin,) samples as a tensor."""
    piece = audio[begin:end]
    return piece if isinstance(piece, Tensor) else torch.as_tensor(piece)


def check_audio(audio: Any, config: EncoderConfig) -> int:
    """How many samples there are.

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
