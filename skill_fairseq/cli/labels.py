"""`skill-labels`: letter or SentencePiece labels for fine-tuning, from transcripts and fairseq manifests."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from skill_fairseq.audio.manifest import Manifest, check_manifest, read_manifest, write_manifest
from skill_fairseq.cli._common import run
from skill_fairseq.labels.transcripts import Normaliser, align, read_transcripts
from skill_fairseq.labels.units import (
    Units,
    letters,
    read_units,
    sentence_pieces,
    too_short,
    write_lines,
    write_units,
)

EPILOG = """examples:
  skill-labels manifests/train.tsv manifests/valid.tsv --transcripts LibriSpeech --out letters
  skill-labels manifests/train.tsv manifests/valid.tsv --transcripts LibriSpeech --out pieces \\
      --units unigram --vocabulary-size 1000
  skill-labels other/test.tsv --transcripts other/text.tsv --out other/letters --units-of letters

writes, for each manifest SPLIT.tsv, OUT/SPLIT.tsv (with an absolute root), OUT/SPLIT.wrd (words) and OUT/SPLIT.ltr
or .spm (units, fairseq's task.labels), and for all of them OUT/dict.ltr.txt, or OUT/dict.spm.txt and OUT/spm.model.
OUT is then task.data of a run with config/finetune.

The first manifest is the training set: the units are its. Transcripts are LibriSpeech's *.trans.txt (name, space,
text), or tab-separated: a path or a file's name without ending first, the text last; a header line may stand above.
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    manifests = [read_manifest(path) for path in args.manifests]
    _check_targets(manifests, args.out)
    for manifest in manifests:
        check_manifest(manifest)
    normalise = Normaliser(args.case, args.characters)
    source = read_transcripts(args.transcripts)
    texts = [_normalised(manifest, align(manifest, source), normalise) for manifest in manifests]
    _print_text(normalise)

    if args.units_of is not None:
        units = read_units(args.units_of)
        print(f"units: {len(units.symbols)} of {args.units_of}")
    elif args.units == "letters":
        units = letters(texts[0])
        print(f"units: {len(units.symbols)} letters of {manifests[0].source}, '|' ends a word")
    else:
        units = sentence_pieces(texts[0], args.units, args.vocabulary_size)
        print(f"units: {len(units.symbols)} pieces ({args.units}) learned from {manifests[0].source}")

    labels = [[units(text) for text in split] for split in texts]
    counts = Counter(unit for row in labels[0] for unit in row)
    for manifest, split, rows in zip(manifests, texts, labels):
        target = args.out / manifest.source.name
        if target.resolve() != manifest.source.resolve():
            write_manifest(target, manifest.root, manifest.paths, manifest.sizes)
        write_lines(target.with_suffix(".wrd"), split)
        write_lines(target.with_suffix(f".{units.labels}"), (" ".join(row) for row in rows))
        _print_split(manifest, split, rows, units)
    write_units(args.out, units, counts)
    print(f"{args.out}: use it with task.data={args.out.resolve()} task.labels={units.labels}")
    return 0


def _check_targets(manifests: Sequence[Manifest], out: Path) -> None:
    """Two manifests of one name, or a manifest whose relative root would be overwritten."""
    names = Counter(manifest.source.name for manifest in manifests)
    for manifest in manifests:
        name = manifest.source.name
        if manifest.source.suffix != ".tsv":
            raise ValueError(f"{manifest.source}: expected a manifest SPLIT.tsv, as fairseq looks for it; rename it")
        if names[name] > 1:
            raise ValueError(f"{name}: {names[name]} manifests have this name; give each split another one")
        if (out / name).resolve() == manifest.source.resolve():
            root = manifest.source.read_text(encoding="utf-8").split("\n", 1)[0]
            if not Path(root).is_absolute():
                raise ValueError(
                    f"--out {out}: holds {name} itself, whose root {root!r} is relative; fairseq's fine-tuning takes "
                    "that relative to the working directory. Choose another folder: it gets an absolute root"
                )


def _normalised(manifest: Manifest, raw: Sequence[str], normalise: Normaliser) -> list[str]:
    texts = []
    for path, text in zip(manifest.paths, raw):
        first = not normalise.unknown
        texts.append(normalise(text))
        if first and normalise.unknown:
            example = f"{path}: {text!r}"
        elif not texts[-1] and not normalise.unknown:
            raise ValueError(
                f"{manifest.source}: nothing is left of the transcript of {path}: {text!r}; leave the recording out of "
                "the manifest, or correct the transcript"
            )
    if normalise.unknown:
        raise ValueError(
            f"{manifest.source}: characters that are spoken but not kept: {_listed(normalise.unknown)}; the first in "
            f"{example}; write them out in words, or keep them by --characters"
        )
    return texts


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{symbol!r} {count}" for symbol, count in counts.most_common())


def _print_text(normalise: Normaliser) -> None:
    case = {"upper": "upper case", "lower": "lower case", "keep": "case as it is"}[normalise.case]
    print(f"text: NFKC, {case}; {len(normalise.kept)} characters kept: {' '.join(sorted(normalise.kept))}")
    if normalise.replaced:
        print(f"text: replaced by a space: {_listed(normalise.replaced)}")


def _print_split(manifest: Manifest, texts: Sequence[str], rows: Sequence[Sequence[str]], units: Units) -> None:
    words, count = sum(len(text.split()) for text in texts), sum(map(len, rows))
    print(f"{manifest.source.stem}: {len(texts)} recordings, {words} words, {count} units")
    known = set(units.symbols)
    unknown = Counter(unit for row in rows for unit in row if unit not in known)
    if unknown:
        print(f"  not among the units, fairseq reads them as <unk>: {_listed(unknown)}")
    short = too_short(manifest.sizes, rows)
    if short:
        first = ", ".join(manifest.paths[i] for i in short[:3])
        print(
            f"  {len(short)} recordings have fewer frames of 20 ms than their units need, so that CTC has no path for "
            f"them (criterion.zero_infinity=true leaves them out of the loss), the first: {first}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skill-labels",
        description="Write letter or SentencePiece labels and dictionaries for fine-tuning with fairseq's CTC models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("manifests", type=Path, nargs="+", metavar="MANIFEST", help="fairseq manifests SPLIT.tsv, training first")
    add("--transcripts", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders of *.trans.txt")
    add("--out", type=Path, required=True, help="folder to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--units", choices=["letters", "unigram", "bpe"], default="letters", help="default: letters")
    kind.add_argument("--units-of", type=Path, metavar="FOLDER", help="the units of an earlier OUT")
    add("--vocabulary-size", type=int, default=1000, help="SentencePiece pieces (default: 1000)")
    add("--case", choices=["upper", "lower", "keep"], default="upper", help="of the labels (default: upper)")
    add(
        "--characters",
        metavar="CHARS",
        help="characters to keep, after the change of case (default: every letter and the apostrophe); other "
        "punctuation becomes a space, other letters and digits are an error",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
