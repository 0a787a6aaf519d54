"""Tables beside a manifest: a header, then one row per recording in the manifest's order, utterance first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from skill_fairseq.audio.manifest import Manifest
from skill_fairseq.reading import read_text


def read_table(path: Path, header: Sequence[str], more: bool = False) -> tuple[list[str], list[list[str]]]:
    """Reads a tab-separated table.

    Args:
        path: the file.
        header: names of its columns.
        more: whether other columns are allowed, and any order after the first column.

    Returns:
        column names, and rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8, the header differs, or a row has the wrong number of columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write one with the header {' TAB '.join(header)}")
    found, *rows = [line.split("\t") for line in read_text(path).splitlines()] or [[]]
    suits = found[:1] == list(header[:1]) and set(header) <= set(found) if more else found == list(header)
    if not suits:
        raise ValueError(f"{path}, line 1: found {found}, expected the header {header} separated by tabs; add it")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(found):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, expected {len(found)}; correct the line")
    return found, rows


def check_utterances(path: Path, utterances: Sequence[str], manifest: Manifest) -> None:
    """Checks that a table has one row per recording, in order.

    Args:
        path: the table, for messages.
        utterances: its first column: paths in the manifest or file names, with or without the suffix.
        manifest: the manifest.

    Raises:
        ValueError: it does not.
    """
    if len(utterances) != len(manifest):
        raise ValueError(
            f"{path}: {len(utterances)} rows for the {len(manifest)} recordings of {manifest.source}; give one "
            "per recording"
        )
    for number, (utterance, recording) in enumerate(zip(utterances, manifest.paths), start=2):
        file = PurePosixPath(recording)
        if utterance not in (file.stem, file.name, *recording_names(recording)):
            raise ValueError(
                f"{path}, line {number}: utterance {utterance!r}, expected {file.stem!r}; keep the order of "
                f"{manifest.source}"
            )


def recording_names(recording: str) -> tuple[str, str]:
    """A recording's path in the manifest, with and without its suffix."""
    return recording, str(PurePosixPath(recording).with_suffix(""))
