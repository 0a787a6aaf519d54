"""Undamaged checkpoint files, and the newest of them."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.training.checkpoint_files import (
    CheckpointNotWritten,
    WholeCopies,
    damage,
    newest_whole_checkpoint,
    older_checkpoints,
    writing,
)


def write(path: Path, value: float = 0.0) -> Path:
    torch.save({"model": torch.full((1000,), value)}, path)
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 1999
    content[place] ^= 4
    path.write_bytes(content)


def test_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.pt", 2.0)
    assert damage(path) is None
    flip_a_bit(path)
    assert "wrong checksum" in str(damage(path))
    assert not torch.equal(torch.load(path)["model"], torch.full((1000,), 2.0))  # torch itself does not notice
    truncate(write(tmp_path / "half.pt"))
    assert "not a zip file" in str(damage(tmp_path / "half.pt"))
    (tmp_path / "empty.pt").touch()
    assert damage(tmp_path / "empty.pt") is not None


def test_older_checkpoints_the_newest_first(tmp_path: Path) -> None:
    names = ["checkpoint_1_900", "checkpoint_2_1000", "checkpoint_2_1500", "checkpoint1", "checkpoint10", "checkpoint2"]
    for name in [*names, "checkpoint_best", "checkpoint_last", "crash", "checkpoint_2_1500-shard0"]:
        (tmp_path / f"{name}.pt").touch()
    found = [path.stem for path in older_checkpoints(tmp_path / "checkpoint_last.pt")]
    assert found == [
        "checkpoint10",
        "checkpoint2",
        "checkpoint_2_1500",
        "checkpoint_2_1000",
        "checkpoint1",
        "checkpoint_1_900",
    ]
    sharded = older_checkpoints(tmp_path / "checkpoint_last-shard0.pt")
    assert [path.stem for path in sharded] == ["checkpoint_2_1500-shard0"]


@pytest.mark.parametrize("harm", [truncate, flip_a_bit])
def test_a_damaged_last_checkpoint_is_named_and_set_aside(
    tmp_path: Path, harm, caplog: pytest.LogCaptureFixture
) -> None:
    last = write(tmp_path / "checkpoint_last.pt", 2.0)
    for updates in (100, 200, 300):
        write(tmp_path / f"checkpoint_1_{updates}.pt", 2.0)
    harm(last)
    harm(tmp_path / "checkpoint_1_300.pt")
    (tmp_path / "checkpoint_1_400.pt.tmp").touch()
    assert newest_whole_checkpoint(last) == tmp_path / "checkpoint_1_200.pt"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_1_100.pt",
        "checkpoint_1_200.pt",
        "checkpoint_1_300.pt.damaged",
        "checkpoint_last.pt.damaged",
    ]
    assert re.search(says(last, "damaged"), caplog.text)
    assert str(tmp_path / "checkpoint_1_200.pt") in caplog.text
    # A run that ends before it rewrites the last one.
    assert newest_whole_checkpoint(last) == tmp_path / "checkpoint_1_200.pt"


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint_last.pt"
    assert newest_whole_checkpoint(last) == last  # a first start
    truncate(write(last))
    for _ in range(2):  # a requeued job tries again, instead of silently starting from the beginning
        with pytest.raises(ValueError, match=says("no undamaged checkpoint", tmp_path / "checkpoint_last.pt.damaged")):
            newest_whole_checkpoint(last)


@pytest.mark.faults(
    "a kill or a full disk in the middle of writing a checkpoint",
    "the file is complete or absent; leftovers are removed at the next start",
)
def test_a_copy_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "source.pt", 1.0), write(tmp_path / "target.pt", 2.0)
    old = target.read_bytes()

    def full(src: str, dst: str) -> None:
        Path(dst).write_bytes(Path(src).read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), dst)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(CheckpointNotWritten, match=says(target, os.strerror(errno.ENOSPC), "GB")):
            WholeCopies.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == old and not list(tmp_path.glob("*.tmp"))
    WholeCopies.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == source.read_bytes() and not list(tmp_path.glob("*.tmp"))


def test_the_systems_error_is_what_is_told(tmp_path: Path) -> None:
    """torch's writer reports a full disk with its own error."""
    path = tmp_path / "checkpoint_last.pt"
    with pytest.raises(CheckpointNotWritten, match=says(os.strerror(errno.ENOSPC), "GB")):
        with writing(str(path)):
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                raise RuntimeError("PytorchStreamWriter failed writing file") from None


@pytest.mark.parametrize("handled", [None, OSError(errno.EIO, "an audio file")])
def test_errors_of_which_the_system_knows_nothing_are_passed_on(tmp_path: Path, handled: Any) -> None:
    """Free space would not help; an error that was being handled before does not count."""
    path = tmp_path / "crash.pt"
    error = AttributeError("Can't pickle local object")

    def write() -> None:
        with writing(str(path)):
            (tmp_path / "crash.pt.tmp").write_bytes(b"half")
            raise error

    with pytest.raises(AttributeError) as raised:
        if handled is None:
            write()
        try:
            raise handled
        except OSError:
            write()
    assert raised.value is error and not list(tmp_path.iterdir())


def test_a_full_disk_while_another_error_is_handled_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotWritten, match=says(os.strerror(errno.ENOSPC), "GB")):
        try:
            raise ValueError("what crash.pt is written for")
        except ValueError:
            with writing(str(tmp_path / "crash.pt")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def test_what_cannot_be_saved_is_named_by_torch(tmp_path: Path) -> None:
    """A real save that fails for another reason than the disk."""
    path = tmp_path / "checkpoint_last.pt"
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        with writing(str(path)):
            torch.save({"model": lambda: None}, str(path) + ".tmp")
    assert not list(tmp_path.iterdir())
