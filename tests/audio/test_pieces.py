"""Long recordings in pieces."""

from __future__ import annotations

import torch

from skill_fairseq.audio.pieces import PIECE_SECONDS, pieces


def test_short_audio_stays_whole_and_long_audio_has_pieces_of_like_length() -> None:
    most = PIECE_SECONDS * 100
    for samples, lengths in (
        (1, [1]),
        (most, [most]),
        (most + 1, [most // 2 + 1, most // 2]),  # no remainder of one sample
        (3 * most, [most] * 3),
        (3 * most + 2, [4501, 4501, 4500, 4500]),
    ):
        source = torch.arange(samples).expand(2, -1)
        found = pieces(source, sample_rate=100)
        assert [part.size(1) for part in found] == lengths
        assert torch.equal(torch.cat(found, 1), source)
        assert [len(part) for part in pieces(source[0], sample_rate=100)] == lengths
