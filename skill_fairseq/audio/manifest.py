"""fairseq manifests: line 1 a root folder, then one `path TAB number of samples` a line; and reading the
audio they name.

A relative root is relative to the manifest's own folder, so that a data folder can be moved and a command may
start anywhere. (Plain fairseq takes it relative to the working directory; with an absolute root both agree.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from skill_fairseq.files import PathLike, atomic_write

MIN_SAMPLES = 400  # receptive field of the usual conv stack: shorter audio gives no frame


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A list of audio files.

    Attributes:
        root: absolute folder that `paths` are relative to.
        paths: one path a recording, as written in the manifest.
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
    def files(self) -> list[Path]:
        """Absolute path of every recording, in order."""
        return [self.root / path for path in self.paths]


def read_manifest(path: PathLike) -> Manifest:
    """Read a manifest. The audio files themselves are not looked at, see `check_manifest`.

    Raises:
        FileNotFoundError: no such manifest.
        ValueError: a line is not `path TAB samples`, or the manifest lists no audio.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such manifest; write one with skill-manifest FOLDER OUT")
    root, *lines = source.read_text(encoding="utf-8").splitlines() or [""]
    if "\t" in root:
        raise ValueError(f"{source}, line 1: found {root!r}, expected the root folder; add it as the first line")
    paths: list[str] = []
    sizes: list[int] = []
    for number, line in enumerate(lines, start=2):
        name, _, size = line.partition("\t")
        if not name or not size.isascii() or not size.isdigit() or int(size) == 0:
            raise ValueError(
                f"{source}, line {number}: found {line!r}, expected a path, a tab and a number of samples "
                "above 0; write the manifest anew with skill-manifest"
            )
        paths.append(name)
        sizes.append(int(size))
    if not paths:
        raise ValueError(f"{source}: lists no audio, expected at least one recording; write it with skill-manifest")
    return Manifest(root=(source.absolute().parent / root).resolve(), paths=paths, sizes=sizes, source=source)


def check_manifest(manifest: Manifest, show: int = 3) -> None:
    """Make sure that every file of a manifest exists, before any work starts.

    Raises:
        FileNotFoundError: files are missing; the message has their number, the first `show` of them, and a
            remedy.
    """
    missing = [file for file in manifest.files if not file.is_file()]
    if missing:
        first = ", ".join(str(file) for file in missing[:show])
        raise FileNotFoundError(
            f"{manifest.source}: {len(missing)} of {len(manifest)} files are missing, the first: {first}; "
            f"correct the root in line 1 (now {manifest.root}; a relative root is relative to the "
            "manifest's folder), or write the manifest anew with skill-manifest"
        )


def write_manifest(path: PathLike, root: PathLike, paths: Sequence[str], sizes: Sequence[int]) -> None:
    """Write a manifest in one step.

    Args:
        path: the file to write.
        root: line 1, written as given.
        paths: relative to the root.
        sizes: number of samples, one a path.

    Raises:
        ValueError: `paths` and `sizes` differ in length, or a path cannot stand in a manifest (tab or line
            break).
    """
    if len(paths) != len(sizes):
        raise ValueError(f"{path}: {len(paths)} paths but {len(sizes)} sizes; give one size a path")
    for name in paths:
        if not storable(name):
            raise ValueError(f"{path}: {name!r} has a tab or line break, which a manifest cannot hold; rename the file")
    with atomic_write(path) as temporary:
        lines = [str(root), *(f"{name}\t{size}" for name, size in zip(paths, sizes))]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def storable(name: str) -> bool:
    """Whether a manifest can hold this path: it has no tab and no line break of any kind."""
    return "\t" not in name and len(name.splitlines()) == 1


def load_audio(path: PathLike, sample_rate: int = 16000, min_samples: int = MIN_SAMPLES) -> Tensor:
    """Read one mono recording.

    Args:
        path: any file that libsndfile decodes (FLAC, WAV, OGG, ...).
        sample_rate: Hz that the file must have; nothing is resampled.
        min_samples: least number of samples.

    Returns:
        (N,) float32 samples in [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not decodable, another sample rate, more than one channel, too short, or samples not
            finite.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such audio file; correct the manifest or its root")
    try:
        samples, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(
            f"{file}: cannot be decoded ({error}), expected audio such as FLAC or WAV; replace it or leave "
            "it out of the manifest"
        ) from error
    if rate != sample_rate:
        raise ValueError(f"{file}: sample rate {rate} Hz, expected {sample_rate} Hz; {conversion(file, sample_rate)}")
    if samples.shape[1] != 1:
        raise ValueError(f"{file}: {samples.shape[1]} channels, expected 1 (mono); {conversion(file, sample_rate)}")
    if len(samples) < min_samples:
        raise ValueError(
            f"{file}: {len(samples)} samples, expected at least {min_samples} "
            f"({min_samples / sample_rate:g} s); leave it out of the manifest"
        )
    finite = np.isfinite(samples[:, 0])
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ValueError(
            f"{file}: {int((~finite).sum())} samples are NaN or infinite, the first at {bad}, expected "
            "finite numbers; repair the file or leave it out of the manifest"
        )
    return torch.from_numpy(samples[:, 0].copy())


def conversion(file: Path, sample_rate: int = 16000) -> str:
    """The remedy for another sample rate or stereo: a command line that converts the file."""
    return f"convert it: ffmpeg -i '{file}' -ar {sample_rate} -ac 1 '{file.stem}.{sample_rate // 1000}k.flac'"
