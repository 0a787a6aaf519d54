"""Reading text files from any system, and finding files below a folder."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Union

from skill_fairseq.messages import shell_quote

PathLike = Union[str, "os.PathLike[str]"]


def read_text(path: PathLike) -> str:
    r"""Reads a UTF-8 text file, without a byte order mark and with ``\n`` line breaks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8; names file and line.
    """
    return decode(Path(path).read_bytes(), path).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, path: PathLike) -> str:
    """Decodes a file's bytes; a byte order mark and line breaks are kept.

    Raises:
        ValueError: they are not UTF-8; names file and line.
    """
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if content.startswith(mark):
            raise ValueError(_not_utf8(path, 1, "its first two bytes are UTF-16's byte order mark", "UTF-16"))
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise ValueError(_not_utf8(path, line, "found a zero byte", "UTF-16"))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(_not_utf8(path, line, f"found the byte 0x{content[error.start]:02x}", "ISO-8859-1")) from error


def _not_utf8(path: PathLike, line: int, found: str, likely: str) -> str:
    return (
        f"{path}, line {line}: {found}, expected text in UTF-8; if it is {likely}, convert it: "
        f"iconv -f {likely} -t UTF-8 {shell_quote(path)} > converted"
    )


def find_files(
    folder: Path,
    wanted: Callable[[Path], bool] = lambda path: True,
    unreadable: Callable[[OSError], object] | None = None,
    seen: set[str] | None = None,
) -> Iterator[Path]:
    """Every file below a folder, sorted by name within each folder; links to folders are followed.

    Args:
        folder: where to start.
        wanted: a folder for which this is false is not entered.
        unreadable: called with the error of a folder that cannot be listed, instead of raising it.
        seen: real paths of folders not to visit again; new ones are added.
    """

    def fail(error: OSError) -> None:
        raise error

    seen = set() if seen is None else seen
    for where, folders, files in os.walk(folder, followlinks=True, onerror=unreadable or fail):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if wanted(Path(where, name)))
        yield from (Path(where, name) for name in sorted(files))
