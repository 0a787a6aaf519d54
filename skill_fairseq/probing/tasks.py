"""Probe tasks on disk: a folder with manifests and labels, or with verification trials.

Classification: `{train,valid,test}.tsv` and beside each a `.labels.tsv` (header `utterance TAB speaker TAB
label`, one row a recording in the manifest's order). Verification: `test.tsv` and `trials.tsv` (header `same
TAB utterance_a TAB utterance_b`, same = 1 for the same speaker). An utterance's name is its file name without
the ending.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from skill_fairseq.audio.manifest import Manifest, check_manifest, read_manifest
from skill_fairseq.files import PathLike

SPLITS = ("train", "valid", "test")
LABEL_HEADER = ["utterance", "speaker", "label"]
TRIAL_HEADER = ["same", "utterance_a", "utterance_b"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One probe task.

    Attributes:
        name: name of its folder.
        manifests: by split; verification has `test` only.
        labels: by split, one a recording; empty for verification.
        trials: (same speaker, index, index) into the test manifest; None for classification.
    """

    name: str
    manifests: dict[str, Manifest]
    labels: dict[str, list[str]]
    trials: list[tuple[bool, int, int]] | None = None

    @property
    def files(self) -> list[Path]:
        """Every recording of the task."""
        return [file for manifest in self.manifests.values() for file in manifest.files]


def read_task(folder: PathLike) -> Task:
    """Read a task and check that its audio exists, its labels fit its manifests and its classes suffice.

    Raises:
        FileNotFoundError: folder, manifest, labels or audio missing.
        ValueError: labels or trials do not fit the manifest, a test label never occurs in training, fewer
            than 2 classes.
    """
    where = Path(folder)
    if not where.is_dir():
        raise FileNotFoundError(f"{where}: no such task folder; give one that holds train.tsv, valid.tsv and test.tsv")
    name = where.resolve().name
    if (where / "trials.tsv").is_file():
        manifest = _read_audio(where / "test.tsv")
        return Task(name, {"test": manifest}, {}, _read_trials(where / "trials.tsv", manifest))
    manifests = {split: _read_audio(where / f"{split}.tsv") for split in SPLITS}
    labels = {split: _read_labels(where / f"{split}.labels.tsv", manifests[split]) for split in SPLITS}
    known = set(labels["train"])
    if len(known) < 2:
        raise ValueError(f"{where / 'train.labels.tsv'}: {len(known)} class, expected 2 or more; add labels")
    for split in ("valid", "test"):
        strange = sorted(set(labels[split]) - known)
        if strange:
            raise ValueError(
                f"{where / f'{split}.labels.tsv'}: label {strange[0]!r} never occurs in train.labels.tsv, "
                "expected one of its labels; add training recordings of that class or leave these out"
            )
    return Task(name, manifests, labels)


def _read_audio(path: Path) -> Manifest:
    manifest = read_manifest(path)
    check_manifest(manifest)
    return manifest


def _read_table(path: Path, header: list[str]) -> list[list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write one with the header {' TAB '.join(header)}")
    found, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()] or [[]]
    if found != header:
        raise ValueError(f"{path}, line 1: found {found}, expected the header {header} with tabs between; add it")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, expected {len(header)}; mend the line")
    return rows


def _read_labels(path: Path, manifest: Manifest) -> list[str]:
    rows = _read_table(path, LABEL_HEADER)
    if len(rows) != len(manifest):
        raise ValueError(
            f"{path}: {len(rows)} labels for the {len(manifest)} recordings of {manifest.source}; give one label a line"
        )
    for number, (row, file) in enumerate(zip(rows, manifest.files), start=2):
        if row[0] != file.stem:
            raise ValueError(
                f"{path}, line {number}: utterance {row[0]!r}, expected {file.stem!r}; keep the order of "
                f"{manifest.source}"
            )
    return [label for _, _, label in rows]


def _read_trials(path: Path, manifest: Manifest) -> list[tuple[bool, int, int]]:
    place = {file.stem: index for index, file in enumerate(manifest.files)}
    trials = []
    for number, (same, first, second) in enumerate(_read_table(path, TRIAL_HEADER), start=2):
        if same not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: same is {same!r}, expected 0 or 1; mend the line")
        for utterance in (first, second):
            if utterance not in place:
                raise ValueError(f"{path}, line {number}: {utterance!r} is not in {manifest.source}; add it there")
        trials.append((same == "1", place[first], place[second]))
    if len({same for same, _, _ in trials}) != 2:
        raise ValueError(f"{path}: {len(trials)} trials of one kind, expected both same = 1 and same = 0; add trials")
    return trials
