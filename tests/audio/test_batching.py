"""Batches of one length: every utterance once, none padded, none too large."""

from __future__ import annotations

import random

import pytest

from skill_fairseq.audio.batching import length_exact_batches


def test_small_case():
    assert length_exact_batches([5, 7, 5, 5, 7, 9], max_tokens=12) == [[0, 2], [1], [3], [4], [5]]
    assert length_exact_batches([5, 7, 5, 5, 7, 9], max_tokens=15) == [[0, 2, 3], [1, 4], [5]]
    assert length_exact_batches([], max_tokens=1) == []


def test_every_utterance_once_and_as_few_batches_as_possible():
    random.seed(0)
    lengths = [random.randint(1, 12) for _ in range(300)]
    batches = length_exact_batches(lengths, max_tokens=40)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len({lengths[i] for i in batch}) == 1 and batch == sorted(batch)
        assert sum(lengths[i] for i in batch) <= 40
    needed = sum(-(-lengths.count(n) // (40 // n)) for n in set(lengths))
    assert len(batches) == needed
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)


def test_an_utterance_that_is_too_long_stands_alone():
    assert length_exact_batches([50, 50, 3], max_tokens=10) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "said"), [([3], 0, "max_tokens: 0"), ([3, 0], 5, "0 samples at index 1")]
)
def test_bad_numbers(lengths, max_tokens, said):
    with pytest.raises(ValueError, match=said):
        length_exact_batches(lengths, max_tokens)
