"""Scanning every file of a corpus: selection, failures, and resuming."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from skill_fairseq.audio import scan as scanning
from skill_fairseq.audio.scan import Facts, Progress, Sought, find_audio, look, scan


def corpus(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.zeros(800), 16000)
    return folder


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        ([], [], ["dev-clean/1/a.flac", "train-clean/2/b.flac", "train-other/3/c.flac"]),
        (["train-*"], [], ["train-clean/2/b.flac", "train-other/3/c.flac"]),
        (["train-*/"], ["*-other"], ["train-clean/2/b.flac"]),
        ([], ["dev-*", "*/c.flac"], ["train-clean/2/b.flac"]),
        (["*/b.*"], [], ["train-clean/2/b.flac"]),
        (["train"], [], []),
    ],
)
def test_patterns_match_paths_or_folders_in_them(
    tmp_path: Path, include: list[str], exclude: list[str], taken: list[str]
) -> None:
    root = corpus(tmp_path, "dev-clean/1/a.flac", "train-clean/2/b.flac", "train-other/3/c.flac")
    assert list(find_audio(root, [root], Sought(["flac"], include, exclude), [])) == taken


def test_folders_that_overlap_are_visited_once_and_excluded_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = corpus(tmp_path, "a/1.flac", "a/b/2.flac", "c/3.flac", "dev/4.flac")
    visited: list[str] = []
    listed = os.scandir

    def watched(path: str) -> object:
        visited.append(os.path.relpath(path, root))
        return listed(path)

    monkeypatch.setattr(os, "scandir", watched)
    found = find_audio(root, [root / "a" / "b", root], Sought(["flac"], exclude=["dev"]), [])
    assert list(found) == ["a/b/2.flac", "a/1.flac", "c/3.flac"] and "dev" not in visited


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, listed = corpus(tmp_path, "a/1.flac", "closed/2.flac"), os.scandir

    def refusing(path: str) -> object:  # root can list everything
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    unreadable: list[tuple[str, str]] = []
    assert list(find_audio(root, [root], Sought(["flac"]), unreadable)) == ["a/1.flac"]
    assert unreadable == [("closed", "Permission denied")]


def test_a_fifo_is_not_waited_for_and_nothing_in_a_file_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "a.wav")
    assert "regular file" in look(tmp_path / "a.wav").problem
    (tmp_path / "b.wav").symlink_to(tmp_path / "gone.wav")
    assert "audio file" in look(tmp_path / "b.wav").problem
    corpus(tmp_path, "c.flac")
    assert look(tmp_path / "c.flac", decode=True) == Facts(800, 16000, 1)
    for error in (MemoryError(), TypeError("no format"), UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates")):

        def broken(file: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(soundfile, "SoundFile", broken)
        assert (str(error) or "MemoryError") in look(tmp_path / "c.flac").problem


def test_a_scan_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = corpus(tmp_path / "audio", *(f"{i:02d}.flac" for i in range(40)))
    files, path = sorted(root.iterdir()), tmp_path / "unfinished_scan.jsonl"
    first = scan(files, Progress(path, decode=False), jobs=1)
    assert [next(first) for _ in range(25)] == [Facts(800, 16000, 1)] * 25
    first.close()  # like an error or a signal
    assert len(path.read_text().splitlines()) >= 25
    with open(path, "a") as stream:
        stream.write('[false, "')  # a line truncated by a kill
    soundfile.write(files[3], np.zeros(900), 16000)  # changed since
    looked: list[Path] = []
    monkeypatch.setattr(scanning, "look", lambda file, decode: looked.append(file) or look(file, decode))
    facts = list(scan(files, Progress(path, decode=False), jobs=3))
    assert [fact.samples for fact in facts] == [900 if i == 3 else 800 for i in range(40)]
    assert files[3] in looked and set(looked) <= {files[3], *files[25:]}
    looked.clear()
    assert len(list(scan(files, Progress(path, decode=True), jobs=3))) == 40 == len(looked)  # these were not decoded


def test_the_order_is_that_of_the_files_whatever_the_jobs(tmp_path: Path) -> None:
    names = [f"{i:03d}.wav" for i in range(100)]
    for i, name in enumerate(names):
        soundfile.write(tmp_path / name, np.zeros(400 + i), 16000)
    facts = scan([tmp_path / name for name in names], Progress(tmp_path / "scan.jsonl", False), jobs=8)
    assert [fact.samples for fact in facts] == list(range(400, 500))
    rows = [json.loads(line) for line in (tmp_path / "scan.jsonl").read_text().splitlines()]
    assert [row[1] for row in rows] == [str(tmp_path / name) for name in names]


def test_jobs_look_at_files_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for four at a time: on a network file system, their waits overlap."""
    meeting = threading.Barrier(4)

    def waiting(file: Path, decode: bool) -> Facts:
        meeting.wait(60)
        return Facts(problem=file.name)

    monkeypatch.setattr(scanning, "look", waiting)
    files = [tmp_path / f"{i:03d}" for i in range(64)]
    for file in files:
        file.touch()
    facts = list(scan(files, Progress(tmp_path / "scan.jsonl", False), jobs=4))
    assert [fact.problem for fact in facts] == [file.name for file in files]
