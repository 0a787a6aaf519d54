"""Reads transcripts, matches them to a manifest's recordings, and normalises them."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from skill_fairseq.audio.manifest import Manifest
from skill_fairseq.reading import PathLike, find_files, read_text

KEYS = ("path", "file", "filename", "file_name", "audio", "utterance", "utt", "utt_id", "utterance_id", "id")
"""Column names that identify the recording, in order of preference."""
TEXTS = ("sentence", "text", "transcript", "transcription", "raw_text")
"""Column names of the text, in order of preference."""
AUDIO = {".flac", ".wav", ".ogg", ".mp3", ".opus", ".m4a", ".sph"}
RESERVED = "|\u2581"  # word boundaries in letters and in SentencePiece


def read_transcripts(sources: Sequence[PathLike], column: str | None = None) -> dict[str, str]:
    """Reads transcripts.

    Args:
        sources: files, or folders that contain `*.trans.txt` at any depth. A file with a tab in its first line is a
            table. Its first line names the columns: one of :data:`KEYS`, a path or an utterance's name, and one of
            :data:`TEXTS`, the text; without such a line there are two columns, in this order. Other files have
            LibriSpeech's layout: an utterance's name, a space, the text.
        column: the tables' text column.

    Returns:
        text by path or name, as written in the file.

    Raises:
        FileNotFoundError: no such file, or a folder without transcripts.
        ValueError: not UTF-8, a table with an unknown text column, a line without text, or an utterance with two
            different texts.
    """
    texts: dict[str, str] = {}
    for file in find_transcripts(sources):
        first, *rest = read_text(file).split("\n")
        if "\t" in first:
            columns = _columns(file, first.split("\t"), column)
            rows = _table(file, rest if columns.named else [first, *rest], columns)
        elif column is not None:
            raise ValueError(
                f"{file}, line 1: found {first!r}, expected the names of a table's columns, for --column {column}"
            )
        else:
            rows = _lines(file, [first, *rest])
        for number, key, text in rows:
            if texts.setdefault(key, text) != text:
                raise ValueError(
                    f"{file}, line {number}: {key} has another text in an earlier line; keep one of the two, or write "
                    "paths instead of names"
                )
    return texts


@dataclasses.dataclass(frozen=True)
class _Columns:
    """A table's key and text columns, its number of columns, and whether its first line names them."""

    key: int
    text: int
    count: int
    named: bool


def _columns(file: Path, fields: list[str], column: str | None) -> _Columns:
    names = [field.strip().lower() for field in fields]
    keys = [names.index(name) for name in KEYS if name in names]
    texts = [names.index(name) for name in TEXTS if name in names]
    if column is not None:
        texts = [i for i, field in enumerate(fields) if field.strip() == column]
    if keys and texts and keys[0] != texts[0]:
        return _Columns(keys[0], texts[0], len(fields), named=True)
    if column is None and not keys and len(fields) == 2:
        return _Columns(0, 1, 2, named=False)
    raise ValueError(
        f"{file}, line 1: found the columns {', '.join(map(repr, fields))}, expected one named {' or '.join(KEYS[:2])} "
        f"and one named {column or ' or '.join(TEXTS[:3])}; write such a line, or name the text column with --column"
    )


def _table(file: Path, lines: Sequence[str], columns: _Columns) -> Iterator[tuple[int, str, str]]:
    """Line number, key and text of each line."""
    for number, line in enumerate(lines, start=1 + columns.named):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != columns.count:
            raise ValueError(
                f"{file}, line {number}: found {len(fields)} columns in {line!r}, expected {columns.count}, as in line "
                "1; complete the line or delete it"
            )
        key, text = fields[columns.key].strip(), fields[columns.text].strip()
        if not key or not text:
            raise _no_text(file, number, line, "tab")
        yield number, key, text


def _lines(file: Path, lines: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines, start=1):
        key, _, text = line.strip().partition(" ")
        if key and not text.strip():
            raise _no_text(file, number, line, "space")
        if key:
            yield number, key, text.strip()


def _no_text(file: Path, number: int, line: str, separator: str) -> ValueError:
    return ValueError(
        f"{file}, line {number}: found {line!r}, expected an utterance's path or name, a {separator} and its text; "
        "complete the line or delete it"
    )


def align(manifest: Manifest, texts: dict[str, str], show: int = 3) -> list[str]:
    """The text of every recording of a manifest, in its order.

    A recording is looked up by its path in the manifest, by the path without suffix, and by the file name without
    suffix; for the last two, suffixes in the transcripts, such as `.mp3`, are ignored.

    Raises:
        ValueError: recordings without text, or a name shared by two recordings; names the first `show`.
    """
    owners: dict[str, str] = {}
    aligned: list[str] = []
    missing: list[str] = []
    shared: list[str] = []
    bare_keys: dict[str, list[str]] = {}
    for name in texts:
        without = PurePosixPath(name).with_suffix("") if PurePosixPath(name).suffix.lower() in AUDIO else name
        bare_keys.setdefault(str(without), []).append(name)
    for path in manifest.paths:
        bare = PurePosixPath(path).with_suffix("")
        key = next((key for key in (path, str(bare), bare.name) if key in texts), None)
        if key is None:
            alike = bare_keys.get(str(bare).strip()) or bare_keys.get(bare.name.strip()) or []
            key = alike[0] if len({texts[name] for name in alike}) == 1 else None
        if key is None:
            missing.append(path)
        elif owners.setdefault(key, path) != path:
            shared.append(f"{key} ({owners[key]}, {path})")
        else:
            aligned.append(texts[key])
    if missing:
        raise ValueError(
            f"{manifest.source}: {len(missing)} of {len(manifest)} recordings have no transcript, the first: "
            f"{', '.join(missing[:show])}; give the files with their transcripts to --transcripts, or remove "
            "these recordings from the manifest"
        )
    if shared:
        raise ValueError(
            f"{manifest.source}: {len(shared)} transcript names match several recordings, the first: "
            f"{', '.join(shared[:show])}; write paths in the transcripts' first column"
        )
    return aligned


@dataclasses.dataclass
class Normaliser:
    """Normalises texts and counts what it changed.

    Applies Unicode's NFKC, replaces typographic apostrophes by "'", then changes case. Punctuation and symbols that are
    not kept become a space. Letters, marks and digits are spoken, so they are never dropped silently.

    Attributes:
        case: "upper", "lower" or "keep".
        characters: the characters to keep; None: every letter and mark, and the apostrophe.
        kept, replaced, unknown: how often each character was kept, became a space, or is spoken but not in
            `characters`.

    Raises:
        ValueError: `characters` contains a word boundary mark.
    """

    case: str = "upper"
    characters: str | None = None
    kept: Counter[str] = dataclasses.field(default_factory=Counter)
    replaced: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)

    def __post_init__(self) -> None:
        reserved = [character for character in RESERVED if character in (self.characters or "")]
        if reserved:
            raise ValueError(
                f"--characters: {' '.join(reserved)} marks word boundaries, expected characters that are spoken; "
                "leave it out"
            )

    def __call__(self, text: str) -> str:
        """The normalised text, words separated by one space."""
        text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
        text = {"upper": text.upper(), "lower": text.lower(), "keep": text}[self.case]
        return " ".join("".join(self._keep(character) for character in text).split())

    def _keep(self, character: str) -> str:
        kind = unicodedata.category(character)[0]
        if character.isspace():
            return " "
        by_default = kind in "LM" or character == "'"
        if by_default if self.characters is None else character in self.characters:
            self.kept[character] += 1
            return character
        (self.unknown if kind in "LMN" else self.replaced)[character] += 1
        return " "


def find_transcripts(sources: Sequence[PathLike]) -> Iterator[Path]:
    """The transcript files: those given, and each `*.trans.txt` below a folder; links are followed.

    Raises:
        FileNotFoundError: no such file, or a folder without transcripts.
    """
    for source in map(Path, sources):
        if source.is_dir():
            found = [file for file in find_files(source) if file.name.endswith(".trans.txt")]
            if not found:
                raise FileNotFoundError(
                    f"{source}: no *.trans.txt in this folder or below; name the file with the transcripts itself"
                )
            yield from found
        elif source.is_file():
            yield source
        else:
            raise FileNotFoundError(f"{source}: no such file or folder; give the transcripts to --transcripts")
