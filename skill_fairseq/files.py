"""Writing files so that nothing is ever half-written, and naming their content by hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

PathLike = Union[str, "os.PathLike[str]"]


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, it becomes `path` in one step.

    The temporary name keeps the suffix, so that writers which look at it (images, safetensors) are not
    misled. Folders that are missing are made. On any error, Ctrl-C included, the temporary file is removed
    and an existing `path` stays.

        with atomic_write("groups.yaml") as temporary:
            temporary.write_text("groups: []", encoding="utf-8")

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target}: is a folder, expected the name of a file to write; name a file inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_json(path: PathLike, content: Any) -> None:
    """Atomically.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON does not know.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: PathLike) -> Any:
    """The file's content."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Says in errors about files and values which field of the config they come from.

    Raises:
        FileNotFoundError, ValueError: those of the block, ``field`` put in front.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith(field):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{field}: {error}") from error


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces of 1 MiB.

    Raises:
        FileNotFoundError: no such file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def content_sha256(path: PathLike) -> str:
    """SHA-256 of a file; of a folder, that of the lines ``<sha256>  <name>`` of its files, sorted by name.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if not path.is_dir():
        return sha256(path)
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
