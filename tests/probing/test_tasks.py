"""Reading probe tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from skill_fairseq.audio.manifest import write_manifest
from skill_fairseq.probing.tasks import read_task

DATA = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"


def make_task(folder: Path) -> Path:
    """A well-formed task; its audio is empty files, which reading a task does not open."""
    task = folder / "tasks" / "vowels"
    for split, names in {"train": ["a", "b"], "valid": ["c"], "test": ["d", "e"]}.items():
        write_manifest(task / f"{split}.tsv", "../..", [f"{name}.flac" for name in names], [400] * len(names))
        rows = "".join(f"{name}\tspeaker\t{'xy'[i]}\n" for i, name in enumerate(names))
        (task / f"{split}.labels.tsv").write_text("utterance\tspeaker\tlabel\n" + rows)
        for name in names:
            (folder / f"{name}.flac").touch()
    return task


def test_classification_task(tmp_path: Path) -> None:
    task = read_task(make_task(tmp_path))
    assert task.name == "vowels" and task.trials is None
    assert task.labels == {"train": ["x", "y"], "valid": ["x"], "test": ["x", "y"]}
    assert task.files == [tmp_path.resolve() / f"{name}.flac" for name in "abcde"]


@pytest.mark.parametrize(("task", "classes", "sizes"), [("digit", 10, (320, 40, 300)), ("speaker", 6, (240, 60, 120))])
def test_tasks_of_the_example(task: str, classes: int, sizes: tuple[int, int, int]) -> None:
    read = read_task(DATA / "tasks" / task)
    assert tuple(len(read.labels[split]) for split in ("train", "valid", "test")) == sizes
    for labels in read.labels.values():
        counts = {label: labels.count(label) for label in set(labels)}
        assert len(counts) == classes and len(set(counts.values())) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("test.labels.tsv", "utterance\tlabel\n", r"line 1: found .*expected the header"),
        ("test.labels.tsv", "utterance\tspeaker\tlabel\nd\tspeaker\tx\n", "1 labels for the 2 recordings"),
        (
            "test.labels.tsv",
            "utterance\tspeaker\tlabel\ne\ts\ty\nd\ts\tx\n",
            "line 2: utterance 'e', expected 'd'",
        ),
        ("test.labels.tsv", "utterance\tspeaker\tlabel\nd\ts\tx\ne\ty\n", "line 3: 2 columns, expected 3"),
        (
            "test.labels.tsv",
            "utterance\tspeaker\tlabel\nd\ts\tx\ne\ts\tz\n",
            "label 'z' never occurs in train",
        ),
        ("train.labels.tsv", "utterance\tspeaker\tlabel\na\ts\tx\nb\ts\tx\n", "1 class, expected 2 or more"),
        ("trials.tsv", "same\tutterance_a\tutterance_b\n2\td\te\n", "line 2: same is '2', expected 0 or 1"),
        ("trials.tsv", "same\tutterance_a\tutterance_b\n1\td\ta\n", "line 2: 'a' is not in .*test.tsv"),
        ("trials.tsv", "same\tutterance_a\tutterance_b\n1\td\te\n", "1 trials of one kind"),
    ],
)
def test_bad_tables(tmp_path: Path, file: str, text: str, message: str) -> None:
    task = make_task(tmp_path)
    (task / file).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_task(task)
    assert str(task / file) in str(caught.value)


@pytest.mark.parametrize("gone", ["tasks/vowels/valid.tsv", "tasks/vowels/valid.labels.tsv", "c.flac"])
def test_missing_parts(tmp_path: Path, gone: str) -> None:
    task = make_task(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=Path(gone).name):
        read_task(task)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such task folder"):
        read_task(tmp_path / "nothing")


def test_verification_task(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    rows: list[str] = ["same\tutterance_a\tutterance_b", "1\td\td", "0\te\td"]
    (task / "trials.tsv").write_text("\n".join(rows) + "\n")
    read = read_task(task)
    assert read.trials == [(True, 0, 0), (False, 1, 0)] and list(read.manifests) == ["test"] and read.labels == {}
