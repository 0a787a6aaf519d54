"""fairseq manifests (line 1 is a root folder, each further line `path TAB number of samples`), and reading their
audio, any of which may be damaged.

A relative root is relative to the manifest's folder, so a data folder can be moved and commands can start anywhere.
(Plain fairseq resolves it against the working directory; with an absolute root both agree.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import soundfile
import torch
from torch import Tensor

from skill_fairseq.audio.names import check_root, unstorable
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.messages import shell_quote
from skill_fairseq.reading import read_text

logger = logging.getLogger(__name__)

MIN_SAMPLES = 400  # receptive field of the usual conv stack: shorter audio gives no frame
MAX_HOURS = 4  # 0.9 GB at 16 kHz; no encoder can take more at once
BLOCK = 1 << 22  # samples decoded at a time, so a wrong length in a header costs no memory
UNKNOWN = 2**63 - 1  # libsndfile's number of samples if the header has none


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A list of audio files.

    Attributes:
        root: absolute folder that `paths` are relative to.
        paths: one path per recording, as written in the manifest.
        sizes: number of samples of each recording.
        source: the manifest file itself, for messages.
    """

    root: Path
    paths: list[str]
    sizes: list[int]
    source: Path

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def files(self) -> Files:
        """Absolute paths of the recordings, in order, created on demand."""
        return Files(self.root, self.paths)


class Files(Sequence[Path]):
    """Lazy paths below a folder; a list would take 300 bytes per recording, and a millisecond per thousand.

    Args:
        root: the folder.
        paths: relative to it.
    """

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Files: ...

    def __getitem__(self, index: int | slice) -> Path | Files:
        found = self._paths[index]
        return self._root / found if isinstance(found, str) else Files(self._root, found)


def read_manifest(path: PathLike) -> Manifest:
    """Reads a manifest, without checking the audio files; see `check_manifest`.

    Raises:
        FileNotFoundError: no such manifest.
        ValueError: it is not UTF-8, a line is not `path TAB samples`, a path or the root begins with a blank, which
            fairseq would strip, or the manifest lists no audio.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such manifest; write one with skill-manifest FOLDER OUT")
    root, *lines = read_text(source).removesuffix("\n").split("\n")
    if root != root.strip() and "\t" not in root:
        raise ValueError(
            f"{source}, line 1: the root {root!r} begins or ends with a blank, which fairseq strips; remove it, or "
            "rename the folder"
        )
    if "\t" in root:
        raise ValueError(f"{source}, line 1: found {root!r}, expected the root folder; add it as the first line")
    paths: list[str] = []
    sizes: list[int] = []
    for number, line in enumerate(lines, start=2):
        name, _, size = line.partition("\t")
        if not name or not size.isascii() or not size.isdigit() or len(size) > 15 or int(size) == 0:
            raise ValueError(
                f"{source}, line {number}: found {line!r}, expected a path, a tab and a number of samples "
                "above 0; write the manifest again with skill-manifest"
            )
        if name[0].isspace():
            raise ValueError(
                f"{source}, line {number}: the path {name!r} begins with a blank, which fairseq strips; rename the file"
            )
        paths.append(name)
        sizes.append(int(size))
    if not paths:
        raise ValueError(f"{source}: lists no audio, expected at least one recording; write it with skill-manifest")
    return Manifest(root=(source.absolute().parent / root).resolve(), paths=paths, sizes=sizes, source=source)


def check_manifest(manifest: Manifest, chosen: Sequence[int] | None = None, show: int = 3) -> None:
    """Checks, before any work, that the files of a manifest exist.

    Args:
        manifest: the manifest.
        chosen: indices to check; None: all.
        show: number of missing files that the message names.

    Raises:
        FileNotFoundError: files are missing; gives their number, the first ones, and a remedy.
    """
    indices = range(len(manifest)) if chosen is None else chosen
    missing = [index for index in indices if not os.path.isfile(manifest.files[index])]
    if missing:
        first = ", ".join(str(manifest.files[index]) for index in missing[:show])
        looked = "" if len(indices) == len(manifest) else f" checked, of {len(manifest)} in all,"
        raise FileNotFoundError(
            f"{manifest.source}: {len(missing)} of {len(indices)} files{looked} are missing, the first: {first}; "
            f"correct the root in line 1 (now {manifest.root}; a relative root is relative to the "
            "manifest's folder), or write the manifest again with skill-manifest"
        )


def write_manifest(path: PathLike, root: PathLike, paths: Sequence[str], sizes: Sequence[int]) -> None:
    """Writes a manifest atomically.

    Args:
        path: the file to write.
        root: line 1, written as given.
        paths: relative to the root.
        sizes: number of samples of each path.

    Raises:
        ValueError: `paths` and `sizes` differ in length, or a manifest cannot hold the root or a path, see
            :func:`skill_fairseq.audio.names.unstorable`.
    """
    if len(paths) != len(sizes):
        raise ValueError(f"{path}: {len(paths)} paths but {len(sizes)} sizes; give one size per path")
    check_root(root)
    for name in paths:
        reason = unstorable(name)
        if reason:
            raise ValueError(f"{path}: {name!r} {reason}, which a manifest cannot hold; rename the file")
    lines = [str(root), *(f"{name}\t{size}" for name, size in zip(paths, sizes))]
    write_file(path, "\n".join(lines) + "\n")


@contextlib.contextmanager
def open_audio(path: PathLike) -> Iterator[soundfile.SoundFile]:
    """Opens a recording for the duration of a block.

    Args:
        path: any file that libsndfile decodes (FLAC, WAV, OGG, MP3, ...).

    Raises:
        FileNotFoundError: no such file, or not a regular one: a folder, or a pipe (which would wait for a writer).
        ValueError: the decoder raises any exception, on opening or in the block; or the header has no length.
    """
    file = Path(path)
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "no such audio file"
        raise FileNotFoundError(f"{file}: {what}; correct the manifest or its root")
    try:
        with soundfile.SoundFile(str(file)) as audio:
            if audio.frames == UNKNOWN:
                raise _Unfit(
                    f"{file}: its header has no length, as when a program writes to a pipe; write it again: "
                    f"ffmpeg -i {shell_quote(file.absolute())} {shell_quote(f'./{file.stem}.new.flac')}"
                )
            yield audio
    except _Unfit as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # soundfile raises TypeError for .raw, ValueError and MemoryError for odd headers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{file}: cannot be decoded ({reason}), expected audio such as FLAC or WAV; replace it or remove "
            "it from the manifest"
        ) from error


def load_audio(path: PathLike, sample_rate: int = 16000, min_samples: int = MIN_SAMPLES) -> Tensor:
    """Reads one mono recording.

    Args:
        path: any file that libsndfile decodes (FLAC, WAV, OGG, ...).
        sample_rate: required sample rate, Hz; nothing is resampled.
        min_samples: least number of samples.

    Returns:
        (N,) float32 samples in [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded, has another sample rate or several channels, is too short or longer than
            `MAX_HOURS`, differs in length from its header, or has samples that are not finite.
    """
    file = Path(path)
    with open_audio(file) as audio:
        _check_header(audio, file, sample_rate, min_samples)
        samples = _decode(audio, file)
    finite = np.isfinite(samples)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ValueError(
            f"{file}: {int((~finite).sum())} samples are NaN or infinite, the first at {bad}, expected "
            "finite numbers; repair the file or remove it from the manifest"
        )
    return torch.from_numpy(samples)


def readable(
    files: Iterable[PathLike], skipped: list[Path], sample_rate: int = 16000, min_samples: int = MIN_SAMPLES
) -> Iterator[tuple[Path, Tensor]]:
    """Yields the readable recordings of a list.

    Args:
        files: audio.
        skipped: collects unreadable files; the log says why.
        sample_rate, min_samples: as in `load_audio`.

    Yields:
        file and (N,) float32 samples.

    Raises:
        ValueError: none can be read; says why the first cannot.
    """
    first, found = "", False
    for file in map(Path, files):
        try:
            wave = load_audio(file, sample_rate, min_samples)
        except (OSError, ValueError) as error:
            logger.warning(f"recording skipped: {error}")
            skipped.append(file)
            first = first or str(error)
        else:
            found = True
            yield file, wave
    if skipped and not found:
        raise ValueError(f"none of the {len(skipped)} recordings can be used; the first: {first}")


def conversion(file: Path, sample_rate: int = 16000) -> str:
    """The remedy for a wrong sample rate or stereo: a command that converts the file."""
    converted = shell_quote(f"./{file.stem}.{sample_rate // 1000}k.flac")
    return f"convert it: ffmpeg -i {shell_quote(file.absolute())} -ar {sample_rate} -ac 1 {converted}"


def _check_header(audio: soundfile.SoundFile, file: Path, sample_rate: int, min_samples: int) -> None:
    """Refuses what the header shows to be unfit."""
    rate, channels, samples = audio.samplerate, audio.channels, audio.frames
    if rate != sample_rate:
        raise _Unfit(f"{file}: sample rate {rate} Hz, expected {sample_rate} Hz; {conversion(file, sample_rate)}")
    if channels != 1:
        raise _Unfit(f"{file}: {channels} channels, expected 1 (mono); {conversion(file, sample_rate)}")
    if samples < min_samples:
        raise _Unfit(
            f"{file}: {samples} samples, expected at least {min_samples} "
            f"({min_samples / sample_rate:g} s); remove it from the manifest"
        )
    if samples > MAX_HOURS * 3600 * sample_rate:
        raise _Unfit(
            f"{file}: its header gives {samples} samples ({samples / sample_rate / 3600:.1f} hours), expected at most "
            f"{MAX_HOURS} hours; cut it into parts, or replace it if its header is wrong"
        )


def _decode(audio: soundfile.SoundFile, file: Path) -> np.ndarray:
    """Decodes all (N,) samples."""
    blocks = []
    left = audio.frames
    while left > 0:
        blocks.append(audio.read(min(left, BLOCK), dtype="float32", always_2d=True)[:, 0])
        if not len(blocks[-1]):
            break
        left -= len(blocks[-1])
    if left or (audio.format == "MP3" and _unread(file) > 0.1):
        what = f"has {audio.frames - left}" if left else "has more than"
        raise _Unfit(
            f"{file}: {what} of the {audio.frames} samples that its header gives; replace it if it is damaged; an MP3 "
            f"with variable bit rate may lack the header: {conversion(file, audio.samplerate)}"
        )
    return np.ascontiguousarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks))


def _unread(file: Path) -> float:
    """The samples of an MP3 that the decoder skips: it guesses the length from the first frame's bit rate."""
    with open(file, "rb") as stream, soundfile.SoundFile(stream) as audio:
        while len(audio.read(BLOCK)) == BLOCK:
            pass
        return 1 - stream.tell() / max(os.path.getsize(file), 1)


class _Unfit(Exception):
    """An error whose message already names file and remedy."""
