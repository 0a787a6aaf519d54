"""Training labels beside manifests: classes from a table's column, or sequences of units."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from skill_fairseq.audio.manifest import Manifest, read_manifest
from skill_fairseq.labels.tables import check_utterances, read_table
from skill_fairseq.labels.units import read_symbols
from skill_fairseq.reading import read_text

logger = logging.getLogger(__name__)

TABLE = "labels.tsv"
FIELDS = {"file": str, "column": str, "classes": Sequence, "counts": Sequence}
NONE = -1
"""Stands for a missing class, and pads sequences."""

Label = Union[int, "list[int]", None]
"""Index of a class, indices of units, or None for an utterance without a label."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of labels.

    Attributes:
        name: a name chosen by the user.
        file: `SPLIT.FILE` holds the labels of `SPLIT.tsv`: a table if it ends in `tsv`, else one line of units,
            separated by spaces, per recording.
        column: the table's column to use; None for units.
        classes: names of the classes, sorted; or the units' symbols, in the order of `dict.FILE.txt`.
        counts: training utterances per class; empty for units.
    """

    name: str
    file: str
    column: Optional[str]
    classes: tuple[str, ...]
    counts: tuple[int, ...] = ()

    @property
    def is_sequence(self) -> bool:
        """Whether an utterance has a sequence of units instead of one class."""
        return self.column is None

    def read(self, manifest: Manifest) -> list[Label]:
        """The label of every recording of a manifest.

        A class that the training set lacks counts as no label: validation speakers may differ.

        Raises:
            FileNotFoundError: there is no label file beside the manifest.
            ValueError: it does not fit the manifest, or a unit is not in the dictionary.
        """
        path, known = beside(manifest, self.file), {name: index for index, name in enumerate(self.classes)}
        if self.column is not None:
            column = _column(path, self.column, manifest)
            strange = sorted({value for value in column if value and value not in known})
            if strange:
                logger.warning(
                    f"{path}: {sum(value in strange for value in column)} of {len(column)} utterances have a "
                    f"{self.column} that training does not have, such as {strange[0]!r}; they count as unlabelled"
                )
            return [known.get(value) for value in column]
        found: list[Label] = []
        for number, row in enumerate(_lines(path, manifest), start=1):
            unknown = [unit for unit in row if unit not in known]
            if unknown:
                raise ValueError(
                    f"{path}, line {number}: the unit {unknown[0]!r} is not in dict.{self.file}.txt; write both with "
                    "skill-labels"
                )
            found.append([known[unit] for unit in row] or None)
        return found


def beside(manifest: Manifest, file: str) -> Path:
    """`FOLDER/SPLIT.FILE` for the manifest `FOLDER/SPLIT.tsv`."""
    return manifest.source.with_suffix(f".{file}")


def read_targets(given: Any, manifest: Path, field: str = "task.targets") -> dict[str, Target]:
    """The targets that a config names.

    Args:
        given: fields of :class:`Target` by name; `file` defaults to `labels.tsv`, and `column` then to `label`. If
            classes are given, no file is read.
        manifest: the training set's manifest, whose labels define the classes.
        field: config path, for messages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a field is unknown or not usable, or there are fewer than two classes.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{field}: {given!r}; expected labels by a name of your choice, such as {{speaker: {{column: speaker}}}}"
        )
    read: list[Manifest] = []
    targets = {}
    for name, fields in given.items():
        where = f"{field}.{name}"
        fields = {} if fields is None else fields
        if not isinstance(fields, Mapping) or set(fields) - set(FIELDS):
            raise ValueError(f"{where}: {fields!r}; expected fields among {', '.join(FIELDS)}")
        fields = {key: value for key, value in fields.items() if value is not None}
        for key, value in fields.items():
            if not isinstance(value, FIELDS[key]) or (FIELDS[key] is Sequence and isinstance(value, str)) or not value:
                raise ValueError(f"{where}.{key}: {value!r}; expected a {'word' if FIELDS[key] is str else 'list'}")
        file, column = fields.get("file", TABLE), fields.get("column")
        if file.endswith("tsv"):
            column = "label" if column is None else column
        elif column is not None:
            raise ValueError(
                f"{where}.column: {column} does nothing with {where}.file={file}, which is not a table; leave it out"
            )
        classes, counts = list(fields.get("classes", ())), list(fields.get("counts", ()))
        if not classes:
            if not read:
                read.append(read_manifest(manifest))
            if column is None:
                classes = read_symbols(manifest.parent / f"dict.{file}.txt")
            else:
                found = Counter(filter(None, _column(beside(read[0], file), column, read[0])))
                classes = sorted(found)
                counts = [found[value] for value in classes]
        if len(classes) < 2:
            raise ValueError(f"{where}: {len(classes)} class in {manifest.parent}, expected 2 or more; add labels")
        if column is not None and len(counts) != len(classes):
            raise ValueError(f"{where}.counts: {len(counts)} numbers for {len(classes)} classes; give both or none")
        targets[str(name)] = Target(str(name), file, column, tuple(map(str, classes)), tuple(map(int, counts)))
    return targets


def settings(targets: Mapping[str, Target]) -> dict[str, dict[str, Any]]:
    """The config for :func:`read_targets` with the classes filled in, so that a checkpoint needs no label files."""
    return {name: {**_plain(target)} for name, target in targets.items()}


def pad_labels(labels: Sequence[Label], sequences: bool) -> Tensor:
    """Labels of a batch: (B,) int64 classes, or (B, U) units, U those of the longest; -1 where there is none."""
    if not sequences:
        return torch.tensor([NONE if label is None else label for label in labels])
    rows = [torch.tensor(label or [NONE]) for label in labels]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NONE)


def _plain(target: Target) -> dict[str, Any]:
    fields = {**dataclasses.asdict(target), "classes": list(target.classes), "counts": list(target.counts) or None}
    del fields["name"]
    return fields


def _column(path: Path, column: str, manifest: Manifest) -> list[str]:
    header, rows = read_table(path, ["utterance", column], more=True)
    check_utterances(path, [row[0] for row in rows], manifest)
    return [row[header.index(column)].strip() for row in rows]


def _lines(path: Path, manifest: Manifest) -> list[list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write it with skill-labels {manifest.source}")
    lines = read_text(path).removesuffix("\n").split("\n")
    if len(lines) != len(manifest):
        raise ValueError(
            f"{path}: {len(lines)} lines for the {len(manifest)} recordings of {manifest.source}; give one per "
            "recording"
        )
    return [line.split() for line in lines]
