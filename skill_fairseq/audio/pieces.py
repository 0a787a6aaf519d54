"""Splits recordings that are too long for an encoder."""

from __future__ import annotations

from torch import Tensor

PIECE_SECONDS = 60
"""Longest audio to encode at once for statistics over frames. The time of attention grows with the square of the
length, and no encoder was trained on more; 60 s is longer than almost every utterance of the usual corpora."""


def pieces(source: Tensor, sample_rate: int, seconds: float = PIECE_SECONDS) -> tuple[Tensor, ...]:
    """Cuts audio into as few pieces as possible of about equal length; short audio stays whole.

    Args:
        source: (B, N) or (N,) samples.
        sample_rate: Hz.
        seconds: length of a piece at most.

    Returns:
        views (B, N_i) or (N_i,), whose lengths differ by one sample at most.
    """
    longest = round(seconds * sample_rate)
    return source.tensor_split(max(1, -(-source.size(-1) // longest)), dim=-1)
