"""`skill-manifest`: from folders of audio to train, valid and test manifests."""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from skill_fairseq.audio.manifest import MAX_HOURS, MIN_SAMPLES, conversion, write_manifest
from skill_fairseq.audio.names import check_root, unstorable
from skill_fairseq.audio.scan import Facts, Progress, Sought, find_audio, scan
from skill_fairseq.audio.split import SPEAKER, keys_of, split
from skill_fairseq.cli._common import Done, Parser, in_range, run
from skill_fairseq.files import check_output, write_file
from skill_fairseq.messages import printable

EPILOG = f"""examples:
  skill-manifest LibriSpeech/train-clean-100 LibriSpeech/train-clean-360 LibriSpeech/train-other-500 manifests \\
      --valid-percent 1 --split-by speaker
  skill-manifest LibriSpeech manifests --include 'train-*' --split-by speaker
  skill-manifest recordings data --ext wav --min-seconds 2 --max-seconds 15.6 --test-percent 10 --split-by folder

writes OUT/train.tsv and, where their percentage is above 0, OUT/valid.tsv and OUT/test.tsv (fairseq's format,
absolute root: FOLDER, or the nearest folder above all of them), and OUT/left_out.tsv: every file left out, with the
reason. Which file goes where depends on its path (with --split-by: on its speaker or folder) and the seed only, not
on the order in which folders are read.

A scan that was ended goes on where it was: the same command finds OUT/unfinished_scan.jsonl, which is removed at the
end. The exit code is 1 where more files were left out than taken.

The speaker is, by default, the folder above the folder that a file lies in (SPEAKER/CHAPTER/FILE, as in LibriSpeech
and VoxCeleb): --speaker '{SPEAKER}'
"""
PRINTS = {
    "root": "folder that the manifests' paths start from",
    "splits": "path, recordings and hours of each manifest",
    "left_out": "path of the list of files left out, and their number by reason",
}
HELD_OUT = re.compile(r"(dev|test|eval|valid|validation)([-_.]|$)", re.IGNORECASE)


def judge(facts: Facts, args: argparse.Namespace) -> tuple[str, str]:
    """Kind and detail of what is wrong with a file under the command's options; both empty if nothing is."""
    if facts.problem:
        return "unreadable", facts.problem
    if facts.rate != args.sample_rate:
        return "other sample rate", f"{facts.rate} Hz, expected {args.sample_rate} Hz"
    if facts.channels != 1:
        return "not mono", f"{facts.channels} channels, expected 1"
    seconds = facts.samples / facts.rate
    if facts.samples < MIN_SAMPLES or seconds < args.min_seconds:
        return "too short", f"{seconds:.3f} s, expected {max(args.min_seconds, MIN_SAMPLES / facts.rate):g} s or more"
    longest = min(args.max_seconds or math.inf, MAX_HOURS * 3600)
    if seconds > longest:
        return "too long", f"{seconds:.3f} s, expected {longest:g} s or less"
    return "", ""


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    percents = {"valid": args.valid_percent, "test": args.test_percent}
    root = _check(args, percents)
    left_out: list[tuple[str, str, str]] = []
    unreadable: list[tuple[str, str]] = []
    sought = Sought(args.ext, args.include, args.exclude)
    found = list(find_audio(root, [folder.resolve() for folder in args.folder], sought, unreadable))
    left_out += [(name, "unreadable folder", reason) for name, reason in unreadable]
    if not found:
        chosen = " that --include and --exclude leave" if args.include or args.exclude else ""
        refused = f"; {unreadable[0][0]} cannot be read ({unreadable[0][1]})" if unreadable else ""
        raise ValueError(
            f"{root}: no files ending in {', '.join(args.ext)}{chosen}; name the right ending with --ext{refused}"
        )
    left_out += [(repr(name), "unusable name", unstorable(name)) for name in found if unstorable(name)]
    names = [name for name in found if not unstorable(name)]
    keys_of(names, args.split_by, args.speaker)  # fails before the work
    progress = Progress(args.out / "unfinished_scan.jsonl", args.decode)
    paths: list[str] = []
    sizes: list[int] = []
    for name, facts in zip(names, scan([root / name for name in names], progress, args.jobs)):
        kind, detail = judge(facts, args)
        if kind:
            left_out.append((name, kind, detail))
        else:
            paths.append(name)
            sizes.append(facts.samples)

    report = args.out / "left_out.tsv"
    rows = ["path\treason\tdetail", *("\t".join(map(printable, row)) for row in left_out)]
    write_file(report, "\n".join(rows) + "\n")
    _print_left_out(left_out, report, root, args.sample_rate)
    if not paths:
        raise ValueError(
            f"{root}: none of {len(found)} files is usable, expected at least one; the reasons are in {report}"
        )
    keys = keys_of(paths, args.split_by, args.speaker)
    splits = {}
    for name, share in split(keys, percents, args.seed).items():
        if share:
            target = args.out / f"{name}.tsv"
            write_manifest(target, root, [paths[i] for i in share], [sizes[i] for i in share])
            hours = sum(sizes[i] for i in share) / args.sample_rate / 3600
            owners = "" if args.split_by == "file" else f" of {len({keys[i] for i in share})} {args.split_by}s"
            print(f"{target}: {len(share)} recordings{owners}, {hours:.3f} hours")
            splits[name] = {"file": str(target), "recordings": len(share), "hours": hours}
    progress.path.unlink()
    _warn_of_held_out(paths)
    partly = len(left_out) > len(paths)
    if partly:
        print(f"warning: {len(left_out)} files were left out, {len(paths)} taken; see {report}", file=sys.stderr)
    reasons = collections.Counter(kind for _, kind, _ in left_out)
    record = {"root": str(root), "splits": splits, "left_out": {"file": str(report), "reasons": reasons}}
    return Done(record, int(partly))


def _check(args: argparse.Namespace, percents: dict[str, float]) -> Path:
    """What can be refused before anything is read; returns the root of the manifests."""
    for name, percent in percents.items():
        if percent == 0 and (args.out / f"{name}.tsv").exists():
            raise ValueError(
                f"{args.out / f'{name}.tsv'} exists, but --{name}-percent is 0, so that it would no longer "
                "fit the new train.tsv; delete it or choose another folder"
            )
    if args.max_seconds is not None and args.max_seconds < args.min_seconds:
        raise ValueError(
            f"--min-seconds {args.min_seconds:g}, --max-seconds {args.max_seconds:g}: expected 0 <= min <= max"
        )
    try:
        re.compile(args.speaker)
    except re.error as error:
        raise ValueError(f"--speaker: {args.speaker!r} is no regular expression ({error}); correct it") from error
    for folder in args.folder:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the audio")
    root = Path(os.path.commonpath([folder.resolve() for folder in args.folder]))
    check_root(root)
    splits = ["train", *(name for name, percent in percents.items() if percent > 0)]
    for name in ("unfinished_scan.jsonl", "left_out.tsv", *(f"{name}.tsv" for name in splits)):
        check_output(args.out / name, "OUT")
    return root


def _print_left_out(left_out: Sequence[tuple[str, str, str]], report: Path, root: Path, sample_rate: int) -> None:
    """One line a reason with the first three files; the report has them all."""
    if not left_out:
        return
    print(f"left out: {len(left_out)} files, all listed in {report}")
    kinds = collections.Counter(kind for _, kind, _ in left_out)
    for kind, count in kinds.most_common():
        rows = [(name, detail) for name, found, detail in left_out if found == kind]
        shown = "; ".join(f"{printable(name)} ({printable(detail)})" for name, detail in rows[:3])
        print(f"  {kind}: {count}: {shown}{'; ...' if count > 3 else ''}")
        if kind in ("other sample rate", "not mono"):
            print(f"    {conversion(root / rows[0][0], sample_rate)}")


def _warn_of_held_out(paths: Sequence[str]) -> None:
    """Says which folders that were taken are named like those that models are tested on."""
    parts = collections.Counter(part for path in paths for part in PurePosixPath(path).parts[:-1])
    named = [name for name in sorted(parts) if HELD_OUT.match(name)]
    if named:
        count = sum(any(HELD_OUT.match(part) for part in PurePosixPath(path).parts[:-1]) for path in paths)
        shown = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
        print(
            f"warning: {count} recordings come from folders named like test sets ({shown}); leave them out by "
            "--exclude, or name the training folders, if models are to be tested on them",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-manifest",
        description="Write fairseq manifests of folders. Unreadable and out-of-range files, stereo and "
        "other sample rates are listed and left out.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add("folder", type=Path, nargs="+", metavar="FOLDER", help="folders of audio, searched with all their subfolders")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add(
        "--ext",
        nargs="+",
        default=["flac", "wav", "ogg"],
        metavar="EXT",
        help="endings of audio files (default: flac wav ogg)",
    )
    add(
        "--include",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns such as 'train-*' of files to take: their path below the root, or a folder in it",
    )
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns of files to leave out, whatever is included",
    )
    percent = in_range(float, least=0, below=100)
    add("--valid-percent", type=percent, default=1.0, metavar="P", help="share of valid.tsv, percent (default: 1)")
    add("--test-percent", type=percent, default=0.0, metavar="P", help="share of test.tsv, percent (default: 0)")
    add(
        "--split-by",
        choices=["file", "speaker", "folder"],
        default="file",
        help="what is not divided between train, valid and test (default: file)",
    )
    add("--speaker", default=SPEAKER, metavar="REGEX", help="pattern of the speaker in a path, see below")
    parser.add_seed("the split")
    add(
        "--min-seconds",
        type=in_range(float, least=0),
        default=0.5,
        metavar="S",
        help="shortest recording, seconds; a batch is cropped to its shortest (default: 0.5)",
    )
    limit = in_range(float, above=0)
    add("--max-seconds", type=limit, metavar="S", help="longest recording, seconds (default: no limit)")
    add(
        "--sample-rate",
        type=in_range(int, least=1, most=1_000_000),
        default=16000,
        metavar="HZ",
        help="sampling rate of all files, Hz (default: 16000, as the models need)",
    )
    add(
        "--jobs",
        type=in_range(int, least=1, most=256),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="number of files looked at together; a network's file system takes many (default: processors, at most 8)",
    )
    add(
        "--decode",
        action="store_true",
        help="whole decoding of every file, which finds damage and NaN samples (slower)",
    )
    return parser
