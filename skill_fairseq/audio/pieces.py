"""Recordings too long for an encoder, in pieces."""

from __future__ import annotations

from torch import Tensor

PIECE_SECONDS = 60
"""Longest audio that statistics over frames encode at a time. Attention takes time by the square of the length, and no
encoder was trained on more; 60 s is longer than nearly every utterance of the usual corpora."""


def pieces(source: Tensor, sample_rate: int, seconds: float = PIECE_SECONDS) -> tuple[Tensor, ...]:
    """Cuts audio into as few pieces of like length as are short enough; short audio stays whole.

    Args:
        source: (B, N) or (N,) samples.
        sample_rate: Hz.
        seconds: longest piece.

    Returns:
        views (B, N_i) or (N_i,), whose lengths differ by one sample at most.
    """
    longest = round(seconds * sample_rate)
    return source.tensor_split(max(1, -(-source.size(-1) // longest)), dim=-1)
