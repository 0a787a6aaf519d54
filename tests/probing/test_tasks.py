"""Reading probe tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from messages import says

from skill_fairseq.audio.manifest import read_manifest, write_manifest
from skill_fairseq.files import sha256
from skill_fairseq.probing.tasks import SPLITS, read_speakers, read_task

DATA = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"


def make_task(folder: Path) -> Path:
    """A well-formed task with empty audio files, which reading a task does not open."""
    task = folder / "tasks" / "vowels"
    for split, names in {"train": ["a", "b"], "valid": ["c"], "test": ["d", "e"]}.items():
        write_manifest(task / f"{split}.tsv", "../..", [f"{name}.flac" for name in names], [400] * len(names))
        rows = "".join(f"{name}\tof-{name}\t{'xy'[i]}\n" for i, name in enumerate(names))
        (task / f"{split}.labels.tsv").write_text("utterance\tspeaker\tlabel\n" + rows)
        for name in names:
            (folder / f"{name}.flac").touch()
    return task


def test_classification_task(tmp_path: Path) -> None:
    task = read_task(make_task(tmp_path))
    assert task.name == "vowels" and task.trials is None
    assert task.labels == {"train": ["x", "y"], "valid": ["x"], "test": ["x", "y"]}
    assert task.files == [tmp_path.resolve() / f"{name}.flac" for name in "abcde"] and task.speakers == ["of-d", "of-e"]
    assert sorted(task.hashes) == sorted(f"{s}{end}" for s in SPLITS for end in (".tsv", ".labels.tsv"))
    assert task.hashes["valid.tsv"] == sha256(tmp_path / "tasks" / "vowels" / "valid.tsv")


@pytest.mark.parametrize(("task", "classes", "sizes"), [("digit", 10, (320, 40, 300)), ("speaker", 6, (240, 60, 120))])
def test_tasks_of_the_example(task: str, classes: int, sizes: tuple[int, int, int]) -> None:
    read = read_task(DATA / "tasks" / task)
    assert tuple(len(read.labels[split]) for split in ("train", "valid", "test")) == sizes
    for labels in read.labels.values():
        counts = {label: labels.count(label) for label in set(labels)}
        assert len(counts) == classes and len(set(counts.values())) == 1


def test_the_notice_names_the_speakers_of_each_split() -> None:
    notice = (DATA / "NOTICE").read_text()
    who = {}
    for split in SPLITS:
        rows = (DATA / "tasks" / "digit" / f"{split}.labels.tsv").read_text().splitlines()[1:]
        who[split] = ", ".join(sorted({row.split("\t")[1].removeprefix("fsdd-") for row in rows}))
    assert who["train"] == who["valid"]
    assert f"train and valid: {who['train']}; test: {who['test']}\n" in notice
    librispeech = [path for path in (DATA / "audio" / "librispeech").rglob("*.flac")]
    speakers = {path.parent.name for path in librispeech}
    assert f"{len(librispeech)} utterances of {len(speakers)} speakers" in notice
    digits = list((DATA / "audio" / "fsdd").rglob("*.flac"))
    assert f"{len(digits)} recordings of {len({path.parent.name for path in digits})} speakers" in notice


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("test.labels.tsv", "utterance\tlabel\n", ["line 1", "header"]),
        ("test.labels.tsv", "utterance\tspeaker\tlabel\nd\tspeaker\tx\n", ["1 rows", "2 recordings"]),
        (
            "test.labels.tsv",
            "utterance\tspeaker\tlabel\ne\ts\ty\nd\ts\tx\n",
            ["line 2", "'e'", "expected 'd'"],
        ),
        ("test.labels.tsv", "utterance\tspeaker\tlabel\nd\ts\tx\ne\ty\n", ["line 3", "2 columns", "expected 3"]),
        (
            "test.labels.tsv",
            "utterance\tspeaker\tlabel\nd\ts\tx\ne\ts\tz\n",
            ["label 'z'", "train.labels.tsv"],
        ),
        ("test.labels.tsv", "utterance\tspeaker\tlabel\nd\t\tx\ne\ts\ty\n", ["line 2", "speaker"]),
        ("train.labels.tsv", "utterance\tspeaker\tlabel\na\ts\tx\nb\ts\tx\n", ["1 class", 2]),
    ],
)
def test_bad_tables(tmp_path: Path, file: str, text: str, said: list) -> None:
    task = make_task(tmp_path)
    (task / file).write_text(text)
    with pytest.raises(ValueError, match=says(task / file, *said)):
        read_task(task)


@pytest.mark.parametrize("gone", ["tasks/vowels/valid.tsv", "tasks/vowels/valid.labels.tsv", "c.flac"])
def test_missing_parts(tmp_path: Path, gone: str) -> None:
    task = make_task(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=Path(gone).name):
        read_task(task)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=says(tmp_path / "nothing", "task folder")):
        read_task(tmp_path / "nothing")


def make_trials(folder: Path, *lines: str, speakers: str = "") -> Path:
    """As in VoxCeleb: the same file names in every speaker's folder."""
    task = folder / "pairs"
    paths = ["id1/x/00001.wav", "id1/x/00002.wav", "id2/y/00001.wav", "id2/y/00001.flac"]
    for path in paths:
        (folder / "wav" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "wav" / path).touch()
    write_manifest(task / "test.tsv", "../wav", paths, [400] * len(paths))
    (task / "trials.tsv").write_text("\n".join(["same\tutterance_a\tutterance_b", *lines]) + "\n")
    if speakers:
        rows = [f"{path}\t{name}" for path, name in zip(paths, speakers.split())]
        (task / "test.speakers.tsv").write_text("\n".join(["utterance\tspeaker", *rows]) + "\n")
    return task


GOOD = ("1\tid1/x/00001\tid1/x/00002.wav", "0\tid2/y/00001.wav\tid1/x/00001")


def test_verification_task_names_recordings_by_path(tmp_path: Path) -> None:
    read = read_task(make_trials(tmp_path, *GOOD))
    assert read.trials == [(True, 0, 1), (False, 2, 0)] and list(read.manifests) == ["test"] and read.labels == {}
    assert read.speakers is None and sorted(read.hashes) == ["test.tsv", "trials.tsv"]


def test_speakers_of_verification_come_from_a_file(tmp_path: Path) -> None:
    read = read_task(make_trials(tmp_path, *GOOD, speakers="a a b c"))
    assert read.speakers == ["a", "a", "b", "c"] and "test.speakers.tsv" in read.hashes
    with pytest.raises(ValueError, match=says("trials.tsv, line 2", "same", 1, "'a'", "'b'")):
        read_task(make_trials(tmp_path, *GOOD, speakers="a b b c"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2\tid1/x/00001\tid1/x/00002", ["same", "'2'", "0 or 1"]),
        ("1\t00001\tid1/x/00002", ["'00001'", "test.tsv", "path"]),
        ("0\tid2/y/00001\tid1/x/00002", ["'id2/y/00001.wav'", "'id2/y/00001.flac'", "suffix"]),
        ("1\tid1/x/00001\tid1/x/00001.wav", ["'id1/x/00001'", "itself"]),
        ("0\tid1/x/00001.wav\tid2/y/00001.wav", ["same pair", "line 3"]),
        ("1\tid1/x/00002\tid1/x/00001", ["same pair", "line 2"]),
    ],
)
def test_bad_trials(tmp_path: Path, line: str, said: list) -> None:
    with pytest.raises(ValueError, match=says("trials.tsv", "line 4", *said)):
        read_task(make_trials(tmp_path, *GOOD, line))


def test_trials_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says("trials.tsv", "1 trials", "one kind")):
        read_task(make_trials(tmp_path, GOOD[0]))


def test_a_recording_that_stands_twice_is_refused(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    write_manifest(task / "test.tsv", "../..", ["d.flac", "a.flac"], [400, 400])  # a is trained on
    with pytest.raises(ValueError, match=says("test.tsv, line 3", "a.flac", "train.tsv, line 2")):
        read_task(task)


def test_speakers_of_a_manifest(tmp_path: Path) -> None:
    task = make_trials(tmp_path, *GOOD, speakers="a a b c")
    assert read_speakers(read_manifest(task / "test.tsv")) == ["a", "a", "b", "c"]
    rows = (task / "test.speakers.tsv").read_text().splitlines()
    (task / "test.speakers.tsv").write_text("\n".join([rows[0], *reversed(rows[1:])]))
    with pytest.raises(ValueError, match=says("line 2", "'id2/y/00001.flac'", "expected '00001'", "order")):
        read_speakers(read_manifest(task / "test.tsv"))
    (task / "test.speakers.tsv").unlink()
    assert read_speakers(read_manifest(task / "test.tsv")) is None


def test_speakers_of_the_shipped_manifests() -> None:
    """valid.tsv has six; the pairs of the benchmark have eight, ten recordings each."""
    assert len(set(read_speakers(read_manifest(DATA / "valid.tsv")) or ())) == 6
    pairs = DATA.parents[1] / "benchmark" / "tasks" / "verification"
    manifest = read_manifest(pairs / "test.tsv")
    found = read_speakers(manifest) or []
    assert found == [Path(path).parent.name for path in manifest.paths] and len(set(found)) == 8
    place = {str(Path(path).with_suffix("")): name for path, name in zip(manifest.paths, found)}
    rows = [line.split("\t") for line in (pairs / "trials.tsv").read_text().splitlines()[1:]]
    assert len(rows) == 1080 and all((place[a] == place[b]) == (same == "1") for same, a, b in rows)
