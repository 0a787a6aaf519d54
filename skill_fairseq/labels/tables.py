"""Tables that go with a manifest: a header, then one row a recording in the manifest's order, an utterance first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from skill_fairseq.audio.manifest import Manifest
from skill_fairseq.reading import read_text


def read_table(path: Path, header: Sequence[str], more: bool = False) -> tuple[list[str], list[list[str]]]:
    """Read a table with tabs.

    Args:
        path: the file.
        header: names of its columns.
        more: it may have others, and these in any order but for the first.

    Returns:
        names of its columns, and its rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, another header, or a row has another number of columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write one with the header {' TAB '.join(header)}")
    found, *rows = [line.split("\t") for line in read_text(path).splitlines()] or [[]]
    suits = found[:1] == list(header[:1]) and set(header) <= set(found) if more else found == list(header)
    if not suits:
        raise ValueError(f"{path}, line 1: found {found}, expected the header {header} with tabs between; add it")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(found):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, expected {len(found)}; mend the line")
    return found, rows


def check_utterances(path: Path, utterances: Sequence[str], manifest: Manifest) -> None:
    """Makes sure that a table has a row for each recording, in order.

    Args:
        path: the table, for messages.
        utterances: its first column: paths in the manifest or file names, with or without the ending.
        manifest: what it goes with.

    Raises:
        ValueError: it has not.
    """
    if len(utterances) != len(manifest):
        raise ValueError(
            f"{path}: {len(utterances)} rows for the {len(manifest)} recordings of {manifest.source}; give one a "
            "recording"
        )
    for number, (utterance, recording) in enumerate(zip(utterances, manifest.paths), start=2):
        file = PurePosixPath(recording)
        if utterance not in (file.stem, file.name, *recording_names(recording)):
            raise ValueError(
                f"{path}, line {number}: utterance {utterance!r}, expected {file.stem!r}; keep the order of "
                f"{manifest.source}"
            )


def recording_names(recording: str) -> tuple[str, str]:
    """A recording's path in the manifest, and the same without its ending."""
    return recording, str(PurePosixPath(recording).with_suffix(""))
