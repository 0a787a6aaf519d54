"""JSON files of bounded size, and files that are mistaken for checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skill_fairseq.files import parse_json

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


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these bytes (at least nine) is a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


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
    if looks_like_safetensors(head):  # it begins with a length, any bytes of which may look like another kind
        return
    if not head.strip():
        raise ValueError(f"{path}: is empty; download it again")
    for start, kind in _LOOKALIKES:
        if head.lstrip().startswith(start) and start != but:
            raise ValueError(f"{path}: is {kind}; expected {expected}")


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        ValueError: it is not JSON, or not an object; names the file.
    """
    look_alike(path, "JSON", but=b"{")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes; expected at most {MAX_JSON:,} of JSON")
    return parse_fields(path.read_bytes(), path)


def parse_fields(text: str | bytes, path: Path, what: str = "") -> dict[str, Any]:
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
    fields = parse_json(text, where, "download it again")
    if not isinstance(fields, dict):
        raise ValueError(f"{where}holds {type(fields).__name__}; expected an object with named fields")
    return fields
