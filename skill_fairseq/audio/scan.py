"""Looking at every audio file of a corpus: several at a time, on from where an earlier scan was ended."""

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
    """Which files of a corpus are taken; paths are relative to its root.

    Attributes:
        extensions: endings of files, in any case.
        include: if there are any patterns, only what one of them matches.
        exclude: what none of these patterns matches.

    A pattern matches a path, or any folder in it, with shell wildcards of which `*` takes `/` too.
    """

    extensions: Sequence[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def takes(self, path: str) -> bool:
        """Whether a file is taken."""
        suffixes = {"." + extension.lower().lstrip(".") for extension in self.extensions}
        included = not self.include or _matches(path, self.include)
        return os.path.splitext(path)[1].lower() in suffixes and included and not _matches(path, self.exclude)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    parts = path.split("/")
    heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch.fnmatchcase(head, pattern.rstrip("/")) for pattern in patterns for head in heads)


def find_audio(root: Path, folders: Sequence[Path], sought: Sought, unreadable: list[tuple[str, str]]) -> Iterator[str]:
    """Paths below `root` of the files in some folders below it that are sought, sorted folder by folder.

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
    """What a file is.

    Attributes:
        samples, rate, channels: of the audio; 0 if it cannot be read.
        problem: why it cannot be used, empty if it can.
    """

    samples: int = 0
    rate: int = 0
    channels: int = 0
    problem: str = ""


def look(file: Path, decode: bool = False) -> Facts:
    """Open a file, read its header and its last samples; with `decode` all of it. Nothing that is in it is raised."""
    try:
        with open_audio(file) as audio:  # which waits for no FIFO
            facts = Facts(audio.frames, audio.samplerate, audio.channels)
            tail = min(facts.samples, MIN_SAMPLES)
            audio.seek(facts.samples - tail)  # a file that was cut short often still has a good header
            if len(audio.read(tail)) < tail:
                return Facts(problem="ends before the length that its header gives")
        if decode and facts.channels == 1 and facts.samples >= MIN_SAMPLES:
            load_audio(file, facts.rate)
    except Exception as error:  # whatever a decoder makes of what is in a file
        return Facts(problem=str(error).strip() or type(error).__name__)
    return facts


class Progress:
    """The facts of an unfinished scan, in a file from which the next one goes on.

    A file that has changed since, by its size or its time, is looked at again.

    Args:
        path: the file; one JSON list a line.
        decode: whether files are decoded.
    """

    def __init__(self, path: Path, decode: bool) -> None:
        self.path = path
        self.decode = decode
        self.known: dict[str, tuple[list[int], Facts]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a line that was being written when the scan ended
                    decoded, name, stamp, facts = json.loads(line)
                    if decoded or not decode:
                        self.known[name] = (stamp, Facts(*facts))

    def look(self, file: Path) -> tuple[list[int], Facts]:
        """Size and time of a file, and its facts, known ones if it has not changed."""
        try:
            found = os.stat(file)
        except (OSError, ValueError) as error:
            return [], Facts(problem=str(error))
        stamp = [found.st_size, found.st_mtime_ns]
        before, facts = self.known.get(str(file), ([], Facts()))
        return stamp, facts if before == stamp else look(file, self.decode)


def scan(files: Sequence[Path], progress: Progress, jobs: int) -> Iterator[Facts]:
    """The facts of every file, in order, `jobs` of them looked at together."""
    quiet = not sys.stderr.isatty()  # a line every half minute is enough for a log
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
