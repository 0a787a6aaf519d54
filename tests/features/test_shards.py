"""Feature shards: their files, resuming after a kill, and mismatches."""

from __future__ import annotations

import numpy as np
import pytest
from messages import says

from skill_fairseq.features.shards import ShardWriter, read_features, shard_range

SETTINGS = {"model": "a", "layers": [1, 2]}


def recordings(number, width=3):
    """(T, width) features of each recording, T from 0."""
    random = np.random.default_rng(0)
    return [random.normal(size=(length, width)).astype(np.float32) for length in range(1, number + 1)]


def writer(folder, **changes):
    fields = {"name": "train_0_1", "width": 3, "settings": SETTINGS, **changes}
    return ShardWriter(folder, [folder / "one", folder / "two"], **fields)


def test_parts_of_shards_are_fairseqs():
    for total, shards in ((10, 3), (7, 7), (100, 8), (1, 1)):
        parts = [shard_range(total, shards, rank) for rank in range(shards)]
        assert [i for part in parts for i in part] == list(range(total))
        assert parts[0].stop == round(total / shards)
    for total, shards, rank, said in ((5, 2, 2, "rank"), (2, 5, 0, "shards")):
        with pytest.raises(ValueError, match=says(said)):
            shard_range(total, shards, rank)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_are_what_was_written(tmp_path, dtype):
    shard, all_ = writer(tmp_path, dtype=dtype), recordings(4)
    assert shard.append([[all_[0], -all_[0]]]) == 1
    assert shard.append([[all_[3][:1], -all_[3][:1]], [all_[3][1:], -all_[3][1:]]]) == 4  # in two parts
    shard.skip()
    shard.append([[all_[2], -all_[2]]])
    assert not list(tmp_path.rglob("train*"))  # nothing that looks finished
    shard.finish()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        *["train_0_1.json", "train_0_1.len", "train_0_1.len", "train_0_1.npy", "train_0_1.npy"]
    ]
    wanted = [all_[0], all_[3], all_[0][:0], all_[2]]
    for folder, sign in (("one", 1), ("two", -1)):
        whole = np.load(tmp_path / folder / "train_0_1.npy")
        assert whole.dtype == dtype and (tmp_path / folder / "train_0_1.len").read_text() == "1\n4\n0\n3\n"
        np.testing.assert_array_equal(whole, (sign * np.concatenate(wanted)).astype(dtype))
        found = list(read_features(tmp_path / folder, "train"))
        assert all(np.array_equal(a, (sign * b).astype(dtype)) for a, b in zip(found, wanted)) and len(found) == 4


@pytest.mark.parametrize("disturb", ["half a recording", "a line cut", "lost to a power cut", "while renaming", "none"])
def test_a_writer_goes_on_where_another_was_killed(tmp_path, disturb):
    all_ = recordings(5)
    shard = writer(tmp_path)
    for features in all_[:3]:
        shard.append([[features, -features]])
    partial, left = tmp_path / "one" / ".train_0_1.npy.part", 3
    if disturb == "half a recording":
        with open(partial, "ab") as stream:
            stream.write(b"abc")
    elif disturb == "a line cut":
        with open(tmp_path / ".train_0_1.progress", "a") as stream:
            stream.write("lo")
    elif disturb == "lost to a power cut":
        partial.write_bytes(partial.read_bytes()[:-1])
        left = 2
    elif disturb == "while renaming":
        for features in all_[3:]:
            shard.append([[features, -features]])
        names = shard.targets
        shard.targets = [names[0], tmp_path / "two" / "no" / "x.npy"]
        (tmp_path / "two" / "no").write_text("in the way")
        with pytest.raises(OSError):
            shard.finish()
        left = 5
    again = writer(tmp_path)
    assert len(again.lengths) == left and not again.finished
    for features in all_[left:]:
        again.append([[features, -features]])
    again.finish()
    for folder, sign in (("one", 1), ("two", -1)):
        np.testing.assert_array_equal(np.load(tmp_path / folder / "train_0_1.npy"), sign * np.concatenate(all_))
    assert writer(tmp_path).finished


def test_other_settings_are_not_mixed(tmp_path):
    shard = writer(tmp_path)
    for _ in range(2):  # unfinished, then finished
        with pytest.raises(ValueError, match=says("other settings", "layers")):
            writer(tmp_path, settings={**SETTINGS, "layers": [1]})
        shard.append([[recordings(1)[0]] * 2])
        shard.finish()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=says("train_RANK_SHARDS.npy", "skill-features")):
        next(read_features(tmp_path, "train"))
    np.save(tmp_path / "train_1_2.npy", np.zeros((2, 3)))
    with pytest.raises(FileNotFoundError):
        next(read_features(tmp_path, "train"))
    np.save(tmp_path / "train_0_2.npy", np.zeros((2, 3)))
    (tmp_path / "train_0_2.len").write_text("1\n2\n")
    with pytest.raises(ValueError, match=says("train_0_2.npy", "2 frames", 3)):
        next(read_features(tmp_path, "train"))
