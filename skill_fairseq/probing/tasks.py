"""Probe tasks on disk: a folder with manifests and labels or transcripts, or with verification trials.

Classification: `{train,valid,test}.tsv` and beside each a `.labels.tsv` (header `utterance TAB speaker TAB
label`). Letters: the same, with `transcript` instead of `label`. Verification: `test.tsv`, `trials.tsv` (header
`same TAB utterance_a TAB utterance_b`, same = 1 for the same speaker) and, for intervals, `test.speakers.tsv` (header
`utterance TAB speaker`).

Labels and speakers have one row per recording in the manifest's order; an utterance is its path in the manifest or its
file name, with or without the suffix. Trials name recordings by path in the manifest, with or without the suffix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Optional

from skill_fairseq.audio.manifest import Manifest, check_manifest, read_manifest
from skill_fairseq.files import PathLike, sha256
from skill_fairseq.labels.tables import check_utterances, read_table, recording_names
from skill_fairseq.reading import read_text

SPLITS = ("train", "valid", "test")
LABEL_HEADER = ["utterance", "speaker", "label"]
TRANSCRIPT_HEADER = ["utterance", "speaker", "transcript"]
SPEAKER_HEADER = ["utterance", "speaker"]
TRIAL_HEADER = ["same", "utterance_a", "utterance_b"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One probe task.

    Attributes:
        name: name of its folder.
        manifests: by split; verification has only `test`.
        labels: by split, one per recording; empty for verification. They are transcripts if ``transcribed``.
        speakers: speaker of each test recording; None if a verification task does not give them.
        hashes: SHA-256 of each file that was read, by name.
        trials: (same speaker, index, index) into the test manifest; only for verification, else None.
        transcribed: whether the task is to find letters, not classes.
    """

    name: str
    manifests: dict[str, Manifest]
    labels: dict[str, list[str]]
    speakers: Optional[list[str]]
    hashes: dict[str, str]
    trials: Optional[list[tuple[bool, int, int]]] = None
    transcribed: bool = False

    @property
    def files(self) -> list[Path]:
        """Every recording of the task."""
        return [file for manifest in self.manifests.values() for file in manifest.files]


def read_task(folder: PathLike) -> Task:
    """Reads a task and checks that its audio exists, its labels match its manifests and it has enough classes.

    Raises:
        FileNotFoundError: folder, manifest, labels or audio missing.
        ValueError: labels or trials do not match the manifest, a recording appears twice, a test label never occurs in
            training, there are fewer than 2 classes, or a transcript is empty.
    """
    where = Path(folder)
    if not where.is_dir():
        raise FileNotFoundError(f"{where}: no such task folder; give one that holds train.tsv, valid.tsv and test.tsv")
    name = where.resolve().name
    if (where / "trials.tsv").is_file():
        manifest = _read_audio(where / "test.tsv")
        _refuse_twice([manifest])
        speakers = read_speakers(manifest)
        trials = _read_trials(where / "trials.tsv", manifest, speakers)
        names = ["test.tsv", "trials.tsv", *(["test.speakers.tsv"] if speakers else [])]
        return Task(name, {"test": manifest}, {}, speakers, _hashes(where, names), trials)
    manifests = {split: _read_audio(where / f"{split}.tsv") for split in SPLITS}
    _refuse_twice(list(manifests.values()))
    file = where / "train.labels.tsv"
    transcribed = file.is_file() and read_text(file).startswith("\t".join(TRANSCRIPT_HEADER) + "\n")
    header = TRANSCRIPT_HEADER if transcribed else LABEL_HEADER
    rows = {split: _read_rows(where / f"{split}.labels.tsv", header, manifests[split]) for split in SPLITS}
    labels = {split: [row[2] for row in rows[split]] for split in SPLITS}
    known = set(labels["train"])
    if len(known) < 2 and not transcribed:
        raise ValueError(f"{where / 'train.labels.tsv'}: {len(known)} class, expected 2 or more; add labels")
    for split in () if transcribed else ("valid", "test"):
        strange = sorted(set(labels[split]) - known)
        if strange:
            raise ValueError(
                f"{where / f'{split}.labels.tsv'}: label {strange[0]!r} never occurs in train.labels.tsv, "
                "expected one of its labels; add training recordings of that class or leave these out"
            )
    for split in SPLITS if transcribed else ():
        for number, text in enumerate(labels[split], start=2):
            if not text.strip():
                raise ValueError(
                    f"{where / f'{split}.labels.tsv'}, line {number}: no transcript, expected words; leave it out"
                )
    hashes = _hashes(where, [f"{split}{ending}" for split in SPLITS for ending in (".tsv", ".labels.tsv")])
    return Task(name, manifests, labels, [row[1] for row in rows["test"]], hashes, None, transcribed)


def readable_part(task: Task, files: Container[Path]) -> Task:
    """The task restricted to these recordings, with their labels, speakers and trials.

    Args:
        task: the full task.
        files: recordings to keep.

    Raises:
        ValueError: a split or the trials would be empty.
    """
    kept = {s: [i for i, file in enumerate(m.files) if file in files] for s, m in task.manifests.items()}
    if all(len(kept[split]) == len(manifest) for split, manifest in task.manifests.items()):
        return task
    changes: dict[str, Any] = {"manifests": {}, "labels": {}}
    for split, manifest in task.manifests.items():
        if not kept[split]:
            raise ValueError(f"{manifest.source}: none of its {len(manifest)} recordings can be read; replace them")
        changes["manifests"][split] = dataclasses.replace(
            manifest, paths=[manifest.paths[i] for i in kept[split]], sizes=[manifest.sizes[i] for i in kept[split]]
        )
        if split in task.labels:
            changes["labels"][split] = [task.labels[split][i] for i in kept[split]]
    if task.speakers is not None:  # of the test recordings
        changes["speakers"] = [task.speakers[i] for i in kept["test"]]
    if task.trials is not None:
        place = {old: new for new, old in enumerate(kept["test"])}
        changes["trials"] = [(s, place[a], place[b]) for s, a, b in task.trials if a in place and b in place]
        if not changes["trials"]:
            raise ValueError(f"{task.manifests['test'].source}: no trial has two readable recordings")
    return dataclasses.replace(task, **changes)


def read_speakers(manifest: Manifest) -> Optional[list[str]]:
    """The speaker of each recording, from the `.speakers.tsv` beside the manifest; None without such a file.

    Raises:
        ValueError: it does not match the manifest, or a speaker has no name.
    """
    path = manifest.source.with_suffix(".speakers.tsv")
    return [row[1] for row in _read_rows(path, SPEAKER_HEADER, manifest)] if path.is_file() else None


def _hashes(where: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: sha256(where / name) for name in names}


def _read_audio(path: Path) -> Manifest:
    manifest = read_manifest(path)
    check_manifest(manifest)
    return manifest


def _refuse_twice(manifests: Sequence[Manifest]) -> None:
    """A repeated recording would count twice, or be in both training and test set."""
    seen: dict[Path, str] = {}
    for manifest in manifests:
        for number, file in enumerate(manifest.files, start=2):
            place = f"{manifest.source}, line {number}"
            if file in seen:
                raise ValueError(f"{place}: {file} is also in {seen[file]}, expected once; remove one line")
            seen[file] = place


def _read_rows(path: Path, header: Sequence[str], manifest: Manifest) -> list[list[str]]:
    """Rows of a table beside a manifest, which start with an utterance and its speaker."""
    _, rows = read_table(path, header)
    check_utterances(path, [row[0] for row in rows], manifest)
    for number, row in enumerate(rows, start=2):
        if not row[1].strip():
            raise ValueError(f"{path}, line {number}: no speaker, expected a name; intervals need speakers")
    return rows


def _read_trials(path: Path, manifest: Manifest, speakers: Optional[Sequence[str]]) -> list[tuple[bool, int, int]]:
    places: dict[str, list[int]] = {}
    for index, recording in enumerate(manifest.paths):
        for name in dict.fromkeys(recording_names(recording)):
            places.setdefault(name, []).append(index)
    trials, seen = [], dict[tuple[int, int], int]()
    for number, (same, *pair) in enumerate(read_table(path, TRIAL_HEADER)[1], start=2):
        where = f"{path}, line {number}"
        if same not in ("0", "1"):
            raise ValueError(f"{where}: same is {same!r}, expected 0 or 1; correct the line")
        first, second = (_place(name, places, manifest, where) for name in pair)
        if first == second:
            raise ValueError(f"{where}: {pair[0]!r} is paired with itself, expected two recordings; remove the line")
        before = seen.setdefault((min(first, second), max(first, second)), number)
        if before != number:
            raise ValueError(f"{where}: the same pair as line {before}, expected each pair once; remove one of them")
        if speakers and (speakers[first] == speakers[second]) != (same == "1"):
            raise ValueError(
                f"{where}: same is {same}, but the speakers are {speakers[first]!r} and {speakers[second]!r} in "
                f"{manifest.source.with_suffix('.speakers.tsv').name}; correct one of the files"
            )
        trials.append((same == "1", first, second))
    if len({same for same, _, _ in trials}) != 2:
        raise ValueError(f"{path}: {len(trials)} trials of one kind, expected both same = 1 and same = 0; add trials")
    return trials


def _place(name: str, places: dict[str, list[int]], manifest: Manifest, where: str) -> int:
    found = places.get(name, [])
    if len(found) > 1:
        both = " and ".join(repr(manifest.paths[index]) for index in found[:2])
        raise ValueError(f"{where}: {name!r} may be {both} of {manifest.source}; write the path with its suffix")
    if not found:
        raise ValueError(
            f"{where}: {name!r} is not in {manifest.source}, expected a path from it, such as "
            f"{manifest.paths[0]!r}, with or without its suffix"
        )
    return found[0]
