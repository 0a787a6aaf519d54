"""Features of many recordings in one .npy file, as fairseq's k-means scripts read them; writing can resume.

``SPLIT_RANK_SHARDS.npy`` holds the concatenated frames of all recordings, and ``SPLIT_RANK_SHARDS.len`` one line with
the number of frames per recording, in the manifest's order.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skill_fairseq.files import naming, read_json, sync, write_file, write_json

HEADER = 128
"""Bytes of a .npy file's header, which gets the shape at the end."""

LOST = "lost"
"""Number of frames of an unreadable recording in the progress file."""


def shard_range(total: int, shards: int, rank: int) -> range:
    """The range of recordings in a shard, with fairseq's division.

    Raises:
        ValueError: the rank is out of range, or a shard would be empty.
    """
    if not 0 <= rank < shards:
        raise ValueError(f"rank: {rank}; expected 0 to {shards - 1}, for {shards} shards")
    if shards > total:
        raise ValueError(f"shards: {shards} for {total} recordings leave some empty; use at most {total}")
    return range(round(total / shards * rank), round(total / shards * (rank + 1)))


class ShardWriter:
    """Writes one shard of one or several layers, recording by recording.

    Its files are hidden until it is finished; after a kill, the next writer with the same settings resumes after the
    last complete recording.

    Args:
        out: folder of the shard's summary.
        folders: folder of each layer's files.
        name: name of the files, without suffix.
        width: features per frame.
        settings: settings that the numbers depend on, for JSON.
        dtype: "float32" or "float16".

    Raises:
        ValueError: features with other settings exist under this name.

    Attributes:
        lengths: frames of each written recording; None if it could not be read.
        finished: whether the shard is complete.
    """

    def __init__(
        self,
        out: Path,
        folders: Sequence[Path],
        name: str,
        width: int,
        settings: Mapping[str, Any],
        dtype: str = "float32",
    ) -> None:
        self.width, self.dtype, self.settings = width, np.dtype(dtype), dict(settings)
        self.summary, self._progress = out / f"{name}.json", out / f".{name}.progress"
        self.targets = [folder / f"{name}.npy" for folder in folders]
        self._partial = [target.with_name(f".{target.name}.part") for target in self.targets]
        self.lengths: list[int | None] = []
        self.finished = self.summary.is_file()
        found = read_json(self.summary) if self.finished else None
        if found is not None:
            self._check(found.get("settings"), self.summary)
            self.lengths = [None if line == LOST else int(line) for line in found["lengths"]]
            return
        for folder in (out, *folders):
            folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def append(self, parts: Iterable[Sequence[np.ndarray]]) -> int:
        """Adds a recording.

        Args:
            parts: its consecutive pieces, each a (t, width) array per layer.

        Returns:
            its number of frames.
        """
        frames = 0
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(self._open(path)) for path in self._partial]
            for states in parts:
                for stream, state in zip(streams, states):
                    stream.write(np.ascontiguousarray(state, dtype=self.dtype).tobytes())
                frames += len(states[0])
        self._note(frames)
        return frames

    def skip(self) -> None:
        """Adds an unreadable recording, which has no frames but keeps its place in the list."""
        self._note(None)

    def finish(self) -> None:
        """Renames the files to their final names, and writes the summary last."""
        frames = sum(length or 0 for length in self.lengths)
        text = "".join(f"{length or 0}\n" for length in self.lengths)
        for partial, target in zip(self._partial, self.targets):
            write_file(target.with_suffix(".len"), text)
            if partial.exists():
                with naming(target, partial), open(partial, "r+b") as stream:
                    stream.write(_header(self.dtype, (frames, self.width)))
                    stream.flush()
                    os.fsync(stream.fileno())
                with naming(target, partial):
                    os.replace(partial, target)
                sync(target.parent)
        lengths = [LOST if length is None else length for length in self.lengths]
        write_json(self.summary, {"settings": self.settings, "frames": frames, "lengths": lengths})
        self._progress.unlink(missing_ok=True)
        self.finished = True

    def _resume(self) -> None:
        """Reads the progress file, and truncates an unfinished recording."""
        lines = self._progress.read_text(encoding="utf-8").splitlines() if self._progress.is_file() else []
        if lines:
            self._check(json.loads(lines[0]), self._progress)
        else:
            for path in self._partial:
                path.unlink(missing_ok=True)
            write_file(self._progress, json.dumps(self.settings) + "\n")
        for line in lines[1:]:
            if line != LOST and not line.isdigit():
                break  # incomplete line
            self.lengths.append(None if line == LOST else int(line))
        size = self.width * self.dtype.itemsize
        there = [path.stat().st_size for path in self._partial if path.exists()]
        if there:  # none if the kill came while files were renamed
            while self.lengths and HEADER + size * sum(length or 0 for length in self.lengths) > min(there):
                self.lengths.pop()  # after a power cut, data may be missing
            for path in self._partial:
                if path.exists():
                    os.truncate(path, HEADER + size * sum(length or 0 for length in self.lengths))
        noted = "".join(f"{LOST if length is None else length}\n" for length in self.lengths)
        write_file(self._progress, json.dumps(self.settings) + "\n" + noted)

    def _open(self, path: Path) -> Any:
        """Opens a partial file at its end, after the space for the header."""
        if not path.exists():
            path.write_bytes(bytes(HEADER))
        return open(path, "ab")

    def _note(self, length: int | None) -> None:
        self.lengths.append(length)
        with open(self._progress, "a", encoding="utf-8") as stream:
            stream.write(f"{LOST if length is None else length}\n")

    def _check(self, found: Any, path: Path) -> None:
        if found != self.settings:
            before = found if isinstance(found, dict) else {}
            changed = [name for name, value in self.settings.items() if before.get(name) != value]
            raise ValueError(
                f"{path}: features with other settings exist ({', '.join(changed) or 'some'} differ); choose another "
                "folder, or remove them"
            )


def read_features(folder: Path, split: str) -> Iterator[np.ndarray]:
    """Yields the features of every recording of a split, in the manifest's order; files are memory-mapped.

    Args:
        folder: folder of one layer.
        split: name of the manifest without suffix.

    Yields:
        (T, D), with T = 0 for an unreadable recording.

    Raises:
        FileNotFoundError: there are no features, or shards are missing.
        ValueError: a .len file does not match its features.
    """
    pattern = re.compile(re.escape(split) + r"_(\d+)_(\d+)\.npy")
    found = {(int(m[2]), int(m[1])): path for path in Path(folder).glob("*.npy") if (m := pattern.fullmatch(path.name))}
    for shards in sorted({shards for shards, _ in found}):
        if all((shards, rank) in found for rank in range(shards)):
            break
    else:
        raise FileNotFoundError(f"{folder}: no complete set of {split}_RANK_SHARDS.npy; write it with skill-features")
    for rank in range(shards):
        path = found[shards, rank]
        features = np.load(path, mmap_mode="r")
        lengths = [int(line) for line in path.with_suffix(".len").read_text(encoding="utf-8").split()]
        if sum(lengths) != len(features):
            raise ValueError(f"{path}: {len(features)} frames, but its .len file has {sum(lengths)}; write both again")
        start = 0
        for length in lengths:
            yield features[start : start + length]
            start += length


def _header(dtype: np.dtype[Any], shape: tuple[int, int]) -> bytes:
    """The header of a .npy file, version 1.0, in :data:`HEADER` bytes."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    length = HEADER - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + fields.ljust(length - 1).encode("latin1") + b"\n"
