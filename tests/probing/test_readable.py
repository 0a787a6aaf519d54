"""Tasks with unreadable recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from messages import says

from skill_fairseq.audio.manifest import Manifest
from skill_fairseq.probing.tasks import Task, readable_part


def manifest(split: str, number: int) -> Manifest:
    names = [f"{split}{i}.flac" for i in range(number)]
    return Manifest(Path("/audio"), names, [1000 + i for i in range(number)], Path(f"{split}.tsv"))


def task(**fields: Any) -> Task:
    return Task(**{"speakers": None, "hashes": {}, **fields})


def without(whole: Task, *names: str) -> set[Path]:
    return {file for file in whole.files if file.name not in names}


def test_labels_go_with_their_recordings() -> None:
    whole = task(
        name="digit",
        manifests={split: manifest(split, 3) for split in ("train", "valid", "test")},
        labels={split: ["one", "two", split] for split in ("train", "valid", "test")},
        speakers=["a", "b", "c"],
    )
    assert readable_part(whole, set(whole.files)) is whole
    part = readable_part(whole, without(whole, "train1.flac", "test0.flac"))
    assert {split: found.paths for split, found in part.manifests.items()} == {
        "train": ["train0.flac", "train2.flac"],
        "valid": ["valid0.flac", "valid1.flac", "valid2.flac"],
        "test": ["test1.flac", "test2.flac"],
    }
    assert part.manifests["train"].sizes == [1000, 1002]
    assert part.labels == {"train": ["one", "train"], "valid": ["one", "two", "valid"], "test": ["two", "test"]}
    assert part.speakers == ["b", "c"]
    with pytest.raises(ValueError, match=says("valid.tsv", "none", "3 recordings")):
        readable_part(whole, without(whole, "valid0.flac", "valid1.flac", "valid2.flac"))


def test_trials_keep_their_recordings() -> None:
    trials = [(True, 0, 2), (False, 1, 2), (True, 3, 2), (False, 3, 0)]
    whole = task(name="verification", manifests={"test": manifest("test", 4)}, labels={}, trials=trials)
    part = readable_part(whole, without(whole, "test1.flac"))
    names = [[part.manifests["test"].paths[i] for i in pair] for _, *pair in part.trials or []]
    assert names == [["test0.flac", "test2.flac"], ["test3.flac", "test2.flac"], ["test3.flac", "test0.flac"]]
    assert [same for same, *_ in part.trials or []] == [True, True, False]
    with pytest.raises(ValueError, match=says("no trial has two readable recordings")):
        readable_part(whole, without(whole, "test2.flac", "test3.flac"))
