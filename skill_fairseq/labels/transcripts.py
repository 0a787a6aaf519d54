"""Transcripts: reading them, matching them to the recordings of a manifest, and bringing them to one form."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from skill_fairseq.audio.manifest import Manifest
from skill_fairseq.files import PathLike

HEADERS = {"utterance", "utt", "path", "file", "id"}  # first fields that make a first line a header
RESERVED = "|\u2581"  # word boundaries: of letters, and of SentencePiece


def read_transcripts(sources: Sequence[PathLike]) -> dict[str, str]:
    """Read transcripts.

    Args:
        sources: files, or folders with `*.trans.txt` somewhere below. A file with a tab in its first line is
            tab-separated: the first field is a path or an utterance's name, the last one the text; a first line
            that starts with a name of a column (`path`, `utterance`, ...) is left out. Others are in LibriSpeech's
            layout: an utterance's name, a space, the text.

    Returns:
        text by path or name, as it stands in the file.

    Raises:
        FileNotFoundError: no such file, or a folder without transcripts.
        ValueError: a line has no text, or an utterance has two different texts.
    """
    texts: dict[str, str] = {}
    for file in _files(sources):
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if number == 1:
                separator = "\t" if "\t" in line else " "
                if separator == "\t" and line.split("\t")[0].strip().lower() in HEADERS:
                    continue
            if not line.strip():
                continue
            key, _, rest = line.partition(separator)  # not stripped: an empty last column is no text
            key, text = key.strip(), rest.rpartition("\t")[2].strip()
            if not text:
                raise ValueError(
                    f"{file}, line {number}: found {line!r}, expected an utterance's path or name, a "
                    f"{'tab' if separator == chr(9) else 'space'} and its text; complete the line or delete it"
                )
            if texts.setdefault(key, text) != text:
                raise ValueError(
                    f"{file}, line {number}: {key} has another text in an earlier line; keep one of the two, or write "
                    "paths instead of names"
                )
    return texts


def align(manifest: Manifest, texts: dict[str, str], show: int = 3) -> list[str]:
    """The text of every recording of a manifest, in its order.

    A recording is looked up by its path as the manifest has it, by the path without ending, and by the file's name
    without ending.

    Raises:
        ValueError: recordings without text, or two recordings that one name stands for; names the first `show`.
    """
    owners: dict[str, str] = {}
    aligned, missing, shared = [], [], []
    for path in manifest.paths:
        bare = PurePosixPath(path).with_suffix("")
        key = next((key for key in (path, str(bare), bare.name) if key in texts), None)
        if key is None:
            missing.append(path)
        elif owners.setdefault(key, path) != path:
            shared.append(f"{key} ({owners[key]}, {path})")
        else:
            aligned.append(texts[key])
    if missing:
        raise ValueError(
            f"{manifest.source}: {len(missing)} of {len(manifest)} recordings have no transcript, the first: "
            f"{', '.join(missing[:show])}; give the files that hold theirs to --transcripts, or leave these "
            "recordings out of the manifest"
        )
    if shared:
        raise ValueError(
            f"{manifest.source}: {len(shared)} names of transcripts stand for several recordings, the first: "
            f"{', '.join(shared[:show])}; write paths in the transcripts' first column"
        )
    return aligned


@dataclasses.dataclass
class Normaliser:
    """Brings texts to one form, and keeps count of what it changed.

    Unicode's NFKC, typographic apostrophes to "'", then case; characters that are not kept become a space if they
    are punctuation or symbols. Letters, marks and digits are spoken: they are never dropped silently.

    Attributes:
        case: "upper", "lower" or "keep".
        characters: what is kept; None: every letter and mark, and the apostrophe.
        kept, replaced, unknown: how often each character was kept, became a space, or is spoken but not to be kept.

    Raises:
        ValueError: `characters` has one that marks word boundaries.
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
                f"--characters: {' '.join(reserved)} marks the boundaries of words, expected characters that are "
                "spoken; leave it out"
            )

    def __call__(self, text: str) -> str:
        """The text in its one form, words separated by one space."""
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


def _files(sources: Sequence[PathLike]) -> Iterator[Path]:
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(source.rglob("*.trans.txt"))
            if not found:
                raise FileNotFoundError(
                    f"{source}: no *.trans.txt in this folder or below; name the file with the transcripts itself"
                )
            yield from found
        elif source.is_file():
            yield source
        else:
            raise FileNotFoundError(f"{source}: no such file or folder; give the transcripts to --transcripts")
