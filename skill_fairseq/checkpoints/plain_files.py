"""Files as they lie in a folder of weights: JSON of a bounded size, and what only looks like a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skill_fairseq.files import parse_json

MAX_JSON = 4_000_000
"""Bytes of JSON that are read; it may take a hundred times its size in memory."""

_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "an HTML or XML page, perhaps a download that failed"),
    (b"fLaC", "FLAC audio"),
    (b"RIFF", "WAV audio"),
    (b"{", "JSON text"),
    (b"\x1f\x8b", "a gzip archive"),
)


def look_alike(path: Path, expected: str, but: bytes = b"") -> None:
    """Raises ValueError where a file is no regular one, is empty, or begins as files of other kinds do.

    Args:
        path: the file.
        expected: what it should be, in words.
        but: the beginning of a kind that is right here.
    """
    if not path.is_file():
        raise ValueError(f"{path}: is no regular file; expected {expected}")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.strip():
        raise ValueError(f"{path}: is empty; fetch it again")
    for start, kind in _LOOKALIKES:
        if head.lstrip().startswith(start) and start != but:
            raise ValueError(f"{path}: is {kind}; expected {expected}")


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        ValueError: it is no JSON, or no object; names the file.
    """
    look_alike(path, "JSON", but=b"{")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes; expected at most {MAX_JSON:,} of JSON")
    return parse_fields(path.read_bytes(), path)


def parse_fields(text: str | bytes, path: Path, what: str = "") -> dict[str, Any]:
    """The fields of a JSON object.

    Args:
        text: JSON; bytes are UTF-8.
        path: the file that it is from, for errors.
        what: the part of the file.

    Raises:
        ValueError: it is no JSON, no object, too long, too deep, or has numbers that JSON does not know.
    """
    where = f"{path}: {what} " if what else f"{path}: "
    if len(text) > MAX_JSON:
        raise ValueError(f"{where}has {len(text):,} bytes; expected at most {MAX_JSON:,} of JSON")
    fields = parse_json(text, where, "fetch it again")
    if not isinstance(fields, dict):
        raise ValueError(f"{where}holds {type(fields).__name__}; expected an object with named fields")
    return fields
