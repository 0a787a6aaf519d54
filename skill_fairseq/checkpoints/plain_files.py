"""JSON files of bounded size, and files that are mistaken for checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON = 4_000_000
"""Maximum bytes of a JSON file, which may take a hundred times its size in memory."""

_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "an HTML or XML page, perhaps a failed download"),
    (b"fLaC", "FLAC audio"),
    (b"RIFF", "WAV audio"),
    (b"{", "JSON text"),
    (b"\x1f\x8b", "a gzip archive"),
)


def look_alike(path: Path, expected: str, but: bytes = b"") -> None:
    """Raises ValueError if a file is not regular, is empty, or begins like another kind of file.

    Args:
        path: the file.
        expected: the expected kind, in words.
        but: the beginning of a kind to accept.
    """
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file; expected {expected}")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.strip():
        raise ValueError(f"{path}: is empty; download it again")
    for start, kind in _LOOKALIKES:
        if head.lstrip().startswith(start) and start != but:
            raise ValueError(f"{path}: is {kind}; expected {expected}")


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        ValueError: it is not JSON, or not an object; names the file.
    """
    look_alike(path, "JSON", but=b"{")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes; expected at most {MAX_JSON:,} of JSON")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, path: Path, what: str = "") -> dict[str, Any]:
    """The fields of a JSON object.

    Args:
        text: JSON; bytes are UTF-8.
        path: its file, for errors.
        what: the part of the file.

    Raises:
        ValueError: it is not JSON, not an object, too long, too deep, or has numbers that JSON cannot hold.
    """
    where = f"{path}: {what} " if what else f"{path}: "
    if len(text) > MAX_JSON:
        raise ValueError(f"{where}has {len(text):,} bytes; expected at most {MAX_JSON:,} of JSON")
    try:
        fields = json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}is not JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}holds {type(fields).__name__}; expected an object with named fields")
    return fields


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
