"""`skill-manifest`: from any folder of audio to train, valid and test manifests."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from skill_fairseq.audio.manifest import MIN_SAMPLES, conversion, load_audio, open_audio, storable, write_manifest
from skill_fairseq.cli._common import run
from skill_fairseq.files import atomic_write

EPILOG = """examples:
  skill-manifest LibriSpeech/train-clean-100 data --valid-percent 1
  skill-manifest recordings data --ext wav --min-seconds 2 --max-seconds 15.6 --test-percent 10

writes OUT/train.tsv and, where their percentage is above 0, OUT/valid.tsv and OUT/test.tsv (fairseq's format,
absolute root), and OUT/left_out.tsv: every file left out, with the reason. Which file goes where depends on
its path and the seed alone, not on the order in which the folder is read.
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a recording must be: Hz, seconds (`longest` None = no limit), and whether to decode it all."""

    sample_rate: int
    shortest: float
    longest: float | None
    decode: bool


def find_audio(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    """Every file below `folder` with one of the extensions, sorted; links to folders are followed once."""
    suffixes = {"." + extension.lower().lstrip(".") for extension in extensions}
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in suffixes:
                yield Path(where, name)


def inspect(file: Path, limits: Limits) -> tuple[int, str, str]:
    """Look at one file.

    Returns:
        its number of samples, and the kind and detail of what is wrong with it (both empty if nothing is).
    """
    try:
        with open_audio(file) as audio:
            rate, channels, samples = audio.samplerate, audio.channels, audio.frames
            tail = min(samples, MIN_SAMPLES)
            audio.seek(samples - tail)  # a file that was cut short often still has a good header
            if len(audio.read(tail)) < tail:
                return 0, "unreadable", "ends before the length that its header gives"
    except (ValueError, OSError) as error:
        return 0, "unreadable", " ".join(str(error).split())
    if rate != limits.sample_rate:
        return samples, "other sample rate", f"{rate} Hz, expected {limits.sample_rate} Hz"
    if channels != 1:
        return samples, "not mono", f"{channels} channels, expected 1"
    seconds = samples / rate
    if samples < MIN_SAMPLES or seconds < limits.shortest:
        return (
            samples,
            "too short",
            f"{seconds:.3f} s, expected {max(limits.shortest, MIN_SAMPLES / rate):g} s or more",
        )
    if limits.longest is not None and seconds > limits.longest:
        return samples, "too long", f"{seconds:.3f} s, expected {limits.longest:g} s or less"
    if limits.decode:
        try:
            load_audio(file, limits.sample_rate)
        except (ValueError, OSError) as error:
            return samples, "unreadable", str(error)
    return samples, "", ""


def split(paths: Sequence[str], percents: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Share recordings out by the rank of a seeded hash of their path.

    Args:
        paths: relative paths.
        percents: per cent of each split but `train`, which gets the rest; a split asked for has at least one
            recording.
        seed: another seed, another split.

    Returns:
        sorted indices into `paths` of each split; `train` comes first.

    Raises:
        ValueError: nothing is left for `train`.
    """
    ranks = {path: hashlib.sha256(f"{seed}\t{path}".encode("utf-8", "surrogateescape")).digest() for path in paths}
    order = sorted(range(len(paths)), key=lambda index: ranks[paths[index]])
    shares: dict[str, list[int]] = {"train": []}
    for name, percent in percents.items():
        count = max(1, round(len(paths) * percent / 100)) if percent > 0 else 0
        shares[name], order = sorted(order[:count]), order[count:]
    if not order:
        raise ValueError(
            f"--valid-percent, --test-percent: {len(paths)} usable recordings leave none for train.tsv, "
            "expected at least one; lower the percentages or add audio"
        )
    shares["train"] = sorted(order)
    return shares


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    percents = {"valid": args.valid_percent, "test": args.test_percent}
    for name, percent in percents.items():
        if not 0 <= percent < 100:
            raise ValueError(f"--{name}-percent: {percent:g}, expected 0 or more and less than 100")
        if percent == 0 and (args.out / f"{name}.tsv").exists():
            raise ValueError(
                f"{args.out / f'{name}.tsv'} exists, but --{name}-percent is 0, so that it would no longer "
                "fit the new train.tsv; delete it or choose another folder"
            )
    if args.min_seconds < 0 or (args.max_seconds is not None and args.max_seconds < args.min_seconds):
        raise ValueError(
            f"--min-seconds {args.min_seconds:g}, --max-seconds {args.max_seconds}: expected 0 <= min <= max"
        )
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder}: no such folder; give the folder that holds the audio")

    root = args.folder.resolve()
    found = list(find_audio(root, args.ext))
    if not found:
        raise ValueError(f"{root}: no files ending in {', '.join(args.ext)}; name the right ending with --ext")
    limits = Limits(args.sample_rate, args.min_seconds, args.max_seconds, args.decode)
    paths: list[str] = []
    sizes: list[int] = []
    left_out: list[tuple[str, str, str]] = []
    for file in tqdm(found, desc="reading", unit="file", disable=None):
        name = str(file.relative_to(root))
        if not storable(name):
            left_out.append((repr(name), "unusable name", "has a tab or line break"))
            continue
        samples, kind, detail = inspect(file, limits)
        if kind:
            left_out.append((name, kind, detail))
        else:
            paths.append(name)
            sizes.append(samples)

    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "left_out.tsv"
    with atomic_write(report) as temporary:
        rows = ["path\treason\tdetail", *("\t".join(row) for row in left_out)]
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogateescape")
    _print_left_out(left_out, report, root, args.sample_rate)
    if not paths:
        raise ValueError(
            f"{root}: none of {len(found)} files is usable, expected at least one; the reasons are in {report}"
        )
    for name, share in split(paths, percents, args.seed).items():
        if share:
            target = args.out / f"{name}.tsv"
            write_manifest(target, root, [paths[i] for i in share], [sizes[i] for i in share])
            hours = sum(sizes[i] for i in share) / args.sample_rate / 3600
            print(f"{target}: {len(share)} recordings, {hours:.3f} hours")
    return 0


def _print_left_out(left_out: Sequence[tuple[str, str, str]], report: Path, root: Path, sample_rate: int) -> None:
    """One line a reason with the first three files; the report has them all."""
    if not left_out:
        return
    print(f"left out: {len(left_out)} files, all listed in {report}")
    kinds = collections.Counter(kind for _, kind, _ in left_out)
    for kind, count in kinds.most_common():
        rows = [(name, detail) for name, found, detail in left_out if found == kind]
        shown = "; ".join(f"{name} ({detail})" for name, detail in rows[:3])
        print(f"  {kind}: {count}: {shown}{'; ...' if count > 3 else ''}")
        if kind in ("other sample rate", "not mono"):
            print(f"    {conversion(root / rows[0][0], sample_rate)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skill-manifest",
        description="Write fairseq manifests of a folder. Unreadable and out-of-range files, stereo and "
        "other sample rates are listed and left out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="searched with all its subfolders")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the manifests")
    parser.add_argument("--ext", nargs="+", default=["flac", "wav", "ogg"], help="file endings (default: flac wav ogg)")
    parser.add_argument("--valid-percent", type=float, default=1.0, help="of the recordings (default: 1)")
    parser.add_argument("--test-percent", type=float, default=0.0, help="of the recordings (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=0.5,
        help="shorter ones are left out, since a batch is cropped to its shortest recording (default: 0.5)",
    )
    parser.add_argument("--max-seconds", type=float, default=None, help="longer ones are left out (default: no limit)")
    parser.add_argument("--sample-rate", type=int, default=16000, help="in Hz; the models need 16000 (default: 16000)")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every file whole to find damage and NaN samples (slower)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
