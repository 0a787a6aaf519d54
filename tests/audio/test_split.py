"""Dividing recordings by file, folder or speaker."""

from __future__ import annotations

import pytest
from messages import says

from skill_fairseq.audio.split import keys_of, split

PATHS = [
    f"{speaker}/{chapter}/{speaker}-{chapter}-{i}.flac"
    for speaker in range(20)
    for chapter in range(3)
    for i in range(5)
]


@pytest.mark.parametrize("by", ["speaker", "folder"])
def test_what_belongs_together_stays_together(by: str) -> None:
    keys = keys_of(PATHS, by)
    assert len(set(keys)) == {"speaker": 20, "folder": 60}[by]
    for seed in range(5):
        shares = split(keys, {"valid": 10, "test": 20}, seed)
        assert sorted(sum(shares.values(), [])) == list(range(300))
        owners = {name: {keys[i] for i in share} for name, share in shares.items()}
        assert not owners["train"] & owners["valid"] and not owners["test"] & (owners["train"] | owners["valid"])
        assert {name: len(share) for name, share in shares.items()} == {"train": 210, "valid": 30, "test": 60}


def test_unequal_speakers_come_as_near_as_they_can() -> None:
    keys = [str(speaker) for speaker in range(40) for _ in range(1 + speaker % 7)]
    for seed in range(20):
        shares = split(keys, {"valid": 10}, seed)
        assert abs(len(shares["valid"]) - round(len(keys) / 10)) <= 3  # half of the largest speaker


def test_a_speaker_in_several_folders_is_one() -> None:
    keys = keys_of(["train-a/84/1/x.flac", "train-b/84/2/y.flac", "train-b/85/2/z.flac"], "speaker")
    assert keys == ["84", "84", "85"]


def test_speakers_by_a_pattern_of_ones_own() -> None:
    paths = ["fsdd-theo-1.flac", "fsdd-lucas-2.flac"]
    assert keys_of(paths, "speaker", "fsdd-([a-z]+)") == ["theo", "lucas"]
    assert keys_of(paths, "speaker", "fsdd-[a-z]+") == ["fsdd-theo", "fsdd-lucas"]
    with pytest.raises(ValueError, match=says("--split-by speaker", "'fsdd-theo-1.flac'", "--speaker")):
        keys_of(paths, "speaker")


def test_one_speaker_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=says(1, "smaller")):
        split(["a"] * 100, {"valid": 10}, 0)
