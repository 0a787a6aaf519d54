"""Equal-length batches and their division over ranks: every utterance once, none padded, none too large or empty."""

from __future__ import annotations

import random

import pytest
from messages import says

from skill_fairseq.audio.batching import length_exact_batches, split_batches


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


@pytest.mark.parametrize(("lengths", "max_tokens", "said"), [([3], 0, "max_tokens: 0"), ([3, 0], 5, "index 1")])
def test_bad_numbers(lengths, max_tokens, said):
    with pytest.raises(ValueError, match=says(said)):
        length_exact_batches(lengths, max_tokens)


@pytest.mark.parametrize(
    ("sizes", "multiple", "expected"),
    [
        ([3, 2], 2, [3, 2]),
        ([3, 2, 2], 2, [2, 1, 2, 2]),
        ([2, 5, 5], 2, [2, 3, 2, 5]),  # the first of equals
        ([8], 4, [2, 2, 2, 2]),
        ([1, 7], 4, [1, 2, 2, 3]),
        ([1, 1, 1], 3, [1, 1, 1]),
        ([4, 4, 4], 1, [4, 4, 4]),
        ([1, 2], 3, [1, 1, 1]),
        ([], 2, []),
    ],
)
def test_split_into_a_multiple(sizes, multiple, expected):
    numbers = iter(random.Random(0).sample(range(100), sum(sizes)))
    batches = [[next(numbers) for _ in range(size)] for size in sizes]
    before = [list(batch) for batch in batches]
    found = split_batches(batches, multiple)
    assert [len(batch) for batch in found] == expected
    assert [i for batch in found for i in batch] == [i for batch in before for i in batch]
    assert batches == before


def test_split_of_many_batches():
    rng = random.Random(1)
    for _ in range(200):
        sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 30))]
        multiple = rng.randint(1, 8)
        wanted = -(-len(sizes) // multiple) * multiple
        numbers = iter(range(sum(sizes)))
        batches = [[next(numbers) for _ in range(size)] for size in sizes]
        if wanted > sum(sizes):
            with pytest.raises(ValueError, match=says(wanted, multiple)):
                split_batches(batches, multiple)
            continue
        found = split_batches(batches, multiple)
        assert len(found) == wanted and all(found) and max(map(len, found)) <= max(sizes)
        assert [i for batch in found for i in batch] == list(range(sum(sizes)))
        kept = [batch for batch in found if batch in batches]
        # No undivided batch is larger than twice a half.
        halves = [len(batch) for batch in found if batch not in batches]
        assert not halves or max(map(len, kept), default=0) <= 2 * max(halves)


def test_too_few_utterances_for_the_ranks():
    said = ("3 utterances", "2 batches", "4 processes", "distributed_training.distributed_world_size")
    with pytest.raises(ValueError, match=says(*said)):
        split_batches([[0, 1], [2]], 4)
    with pytest.raises(ValueError, match=says("3 utterances", "2 processes", "dataset.max_tokens")):
        split_batches([[0], [1], [2]], 2)
    with pytest.raises(ValueError, match=says("multiple: 0")):
        split_batches([[0]], 0)
