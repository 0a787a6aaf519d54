"""Scans the audio files of a corpus in parallel; an interrupted scan can resume."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from skill_fairseq.audio.manifest import MIN_SAMPLES, load_audio, open_audio
from skill_fairseq.reading import find_files


@dataclasses.dataclass(frozen=True)
class Sought:
    """Selects files of a corpus; paths are relative to its root.

    Attributes:
        extensions: file suffixes, in any case.
        include: patterns, of which at least one must match; empty: no restriction.
        exclude: patterns, of which none may match.

    A pattern matches a path, or any folder in it, with shell wildcards; `*` also matches `/`.
    """

    extensions: Sequence[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def takes(self, path: str) -> bool:
        """Whether a file is selected."""
        suffixes = {"." + extension.lower().lstrip(".") for extension in self.extensions}
        included = not self.include or _matches(path, self.include)
        return os.path.splitext(path)[1].lower() in suffixes and included and not _matches(path, self.exclude)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    parts = path.split("/")
    heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch.fnmatchcase(head, pattern.rstrip("/")) for pattern in patterns for head in heads)


def find_audio(root: Path, folders: Sequence[Path], sought: Sought, unreadable: list[tuple[str, str]]) -> Iterator[str]:
    """Paths below `root` of the selected files in some of its folders, sorted within each folder.

    Links to folders are followed, and every folder is visited once. Folders that cannot be listed are added to
    `unreadable`, with the reason.
    """

    def note(error: OSError) -> None:
        unreadable.append((os.path.relpath(str(error.filename), root), error.strerror or str(error)))

    seen: set[str] = set()
    for folder in folders:
        for file in find_files(folder, lambda path: not _matches(_below(path, root), sought.exclude), note, seen):
            path = _below(file, root)
            if sought.takes(path):
                yield path


def _below(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a file.

    Attributes:
        samples, rate, channels: properties of the audio; 0 if it cannot be read.
        problem: why it cannot be used; empty if it can.
    """

    samples: int = 0
    rate: int = 0
    channels: int = 0
    problem: str = ""


def look(file: Path, decode: bool = False) -> Facts:
    """Reads a file's header and last samples, or with `decode` all of it. Damaged content raises nothing."""
    try:
        with open_audio(file) as audio:  # refuses FIFOs instead of waiting
            facts = Facts(audio.frames, audio.samplerate, audio.channels)
            tail = min(facts.samples, MIN_SAMPLES)
            audio.seek(facts.samples - tail)  # a truncated file often still has a good header
            if len(audio.read(tail)) < tail:
                return Facts(problem="ends before the length that its header gives")
        if decode and facts.channels == 1 and facts.samples >= MIN_SAMPLES:
            load_audio(file, facts.rate)
    except Exception as error:  # decoders raise anything on damaged files
        return Facts(problem=str(error).strip() or type(error).__name__)
    return facts


class Progress:
    """A file with the facts of an unfinished scan, from which the next scan resumes.

    An audio file whose size or time has changed is read again.

    Args:
        path: the file; one JSON list per line.
        decode: whether files are decoded.
    """

    def __init__(self, path: Path, decode: bool) -> None:
        self.path = path
        self.decode = decode
        self.known: dict[str, tuple[list[int], Facts]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a line that was not written completely
                    decoded, name, stamp, facts = json.loads(line)
                    if decoded or not decode:
                        self.known[name] = (stamp, Facts(*facts))

    def look(self, file: Path) -> tuple[list[int], Facts]:
        """Size and time of a file, and its facts: the known ones if it has not changed."""
        try:
            found = os.stat(file)
        except (OSError, ValueError) as error:
            return [], Facts(problem=str(error))
        stamp = [found.st_size, found.st_mtime_ns]
        before, facts = self.known.get(str(file), ([], Facts()))
        return stamp, facts if before == stamp else look(file, self.decode)


def scan(files: Sequence[Path], progress: Progress, jobs: int) -> Iterator[Facts]:
    """The facts of every file, in order; reads `jobs` files in parallel."""
    quiet = not sys.stderr.isatty()  # one line per half minute is enough for a log
    bar = functools.partial(tqdm, delay=30 if quiet else 0, mininterval=30 if quiet else 0.1)
    progress.path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPool(jobs) as pool, open(progress.path, "a", encoding="utf-8") as stream:
        saved = -math.inf
        looked = pool.imap(progress.look, files, chunksize=16)
        for file, (stamp, facts) in zip(files, bar(looked, total=len(files), desc="reading", unit="file")):
            if progress.known.get(str(file)) != (stamp, facts):
                row = [progress.decode, str(file), stamp, dataclasses.astuple(facts)]
                stream.write(json.dumps(row) + "\n")
            if time.monotonic() - saved > 1:
                stream.flush()
                saved = time.monotonic()
            yield facts
