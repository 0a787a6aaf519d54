"""`skill-labels`: letter or SentencePiece labels for fine-tuning, from transcripts and fairseq manifests."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from skill_fairseq.audio.manifest import Manifest, read_manifest, unstorable, write_manifest
from skill_fairseq.cli._common import Parser, in_range, run
from skill_fairseq.files import check_output
from skill_fairseq.labels.transcripts import Normaliser, align, find_transcripts, read_transcripts
from skill_fairseq.labels.units import (
    MODEL,
    Units,
    letters,
    read_units,
    sentence_pieces,
    too_short,
    write_lines,
    write_units,
)
from skill_fairseq.messages import require, shell_quote

EPILOG = """examples:
  skill-labels manifests/train.tsv manifests/valid.tsv --transcripts LibriSpeech --out letters
  skill-labels manifests/train.tsv manifests/valid.tsv --transcripts LibriSpeech --out pieces \\
      --units unigram --vocabulary-size 1000
  skill-labels other/test.tsv --transcripts other/text.tsv --out other/letters --units-of letters

writes, for each manifest SPLIT.tsv, OUT/SPLIT.tsv (with an absolute root), OUT/SPLIT.wrd (words) and OUT/SPLIT.ltr
or .spm (units, fairseq's task.labels), and for all of them OUT/dict.ltr.txt, or OUT/dict.spm.txt and OUT/spm.model.
OUT is then task.data of a run with config/finetune.

The first manifest is the training set: the units are its. Transcripts are LibriSpeech's *.trans.txt (name, space,
text), or a table with tabs whose first line names the columns, as Common Voice's does: path (or utterance, ...) and
sentence, text or transcript (another one by --column); two columns without such a line are path or name, and text.
The audio is not looked at.
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.units_of is None and args.units != "letters":
        require(f"--units {args.units}", "sentencepiece")
    manifests = [read_manifest(path) for path in args.manifests]
    _check_targets(manifests, args)
    normalise = Normaliser(args.case, args.characters)
    source = read_transcripts(args.transcripts, args.column)
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
        _print_split(manifest, split, rows, units, args.time_reduction)
    write_units(args.out, units, counts)
    data = shell_quote(f"task.data={args.out.resolve()}")
    print(f"{args.out}: use it with {data} task.labels={units.labels}")
    return 0


def _check_targets(manifests: Sequence[Manifest], args: argparse.Namespace) -> None:
    """Two manifests of one name, a manifest in OUT that fairseq reads otherwise, inputs that would be overwritten."""
    names = Counter(manifest.source.name for manifest in manifests)
    transcripts = list(find_transcripts(args.transcripts))
    model = args.units in ("unigram", "bpe")
    units = [f"dict.{'spm' if model else 'ltr'}.txt", *([MODEL] if model else [])]
    if args.units_of is not None:
        units = [name for name in ("dict.ltr.txt", "dict.spm.txt", MODEL) if (args.units_of / name).is_file()]
    inputs = [*args.manifests, *transcripts, *(args.units_of / name for name in units if args.units_of is not None)]
    labels = "spm" if any("spm" in name for name in units) else "ltr"
    for name in units:
        check_output(args.out / name, "--out", inputs)
    for manifest in manifests:
        name = manifest.source.name
        if manifest.source.suffix != ".tsv":
            raise ValueError(f"{manifest.source}: expected a manifest SPLIT.tsv, as fairseq looks for it; rename it")
        if names[name] > 1:
            raise ValueError(f"{name}: {names[name]} manifests have this name; give each split another one")
        for ending in (".wrd", f".{labels}"):
            check_output((args.out / name).with_suffix(ending), "--out", inputs)
        if (args.out / name).resolve() == manifest.source.resolve():
            _check_in_place(manifest, args.out)
        else:
            check_output(args.out / name, "--out", inputs)


def _check_in_place(manifest: Manifest, out: Path) -> None:
    content = manifest.source.read_bytes()
    root = content.split(b"\n", 1)[0].decode()
    plain = not content.startswith(b"\xef\xbb\xbf") and b"\r" not in content
    if not Path(root).is_absolute() or not plain or unstorable(root):
        fault = f"whose root {root!r} is relative" if plain else "with a byte order mark or Windows' line breaks"
        raise ValueError(
            f"--out {out}: holds {manifest.source.name} itself, {fault}; fairseq's fine-tuning takes that otherwise. "
            "Choose another folder: it gets an absolute root"
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


def _print_split(
    manifest: Manifest, texts: Sequence[str], rows: Sequence[Sequence[str]], units: Units, time_reduction: int
) -> None:
    words, count = sum(len(text.split()) for text in texts), sum(map(len, rows))
    print(f"{manifest.source.stem}: {len(texts)} recordings, {words} words, {count} units")
    known = set(units.symbols)
    unknown = Counter(unit for row in rows for unit in row if unit not in known)
    if unknown:
        print(f"  not among the units, fairseq reads them as <unk>: {_listed(unknown)}")
    short = too_short(manifest.sizes, rows, time_reduction)
    if short:
        first = ", ".join(manifest.paths[i] for i in short[:3])
        print(
            f"  {len(short)} recordings have fewer frames of {20 * time_reduction} ms than their units need, so that "
            f"CTC has no path for them (criterion.zero_infinity=true leaves them out of the loss), the first: {first}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-labels",
        description="Write letter or SentencePiece labels and dictionaries for fine-tuning with fairseq's CTC models.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("manifests", type=Path, nargs="+", metavar="MANIFEST", help="fairseq manifests SPLIT.tsv, training first")
    add("--transcripts", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders of *.trans.txt")
    add("--column", metavar="NAME", help="tables' column of texts (default: sentence, text or transcript)")
    add("--out", type=Path, required=True, help="folder to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--units", choices=["letters", "unigram", "bpe"], default="letters", help="default: letters")
    kind.add_argument("--units-of", type=Path, metavar="FOLDER", help="the units of an earlier OUT")
    size = in_range(int, least=1, most=10_000_000)
    add("--vocabulary-size", type=size, metavar="N", default=1000, help="SentencePiece pieces (default: 1000)")
    add(
        "--time-reduction",
        type=in_range(int, least=1, most=100),
        metavar="N",
        default=1,
        help="frames that the encoder makes one of, its model.time_reduction: recordings with fewer frames than units "
        "are named (default: 1)",
    )
    add("--case", choices=["upper", "lower", "keep"], default="upper", help="of the labels (default: upper)")
    add(
        "--characters",
        metavar="CHARS",
        help="characters to keep, after the change of case (default: every letter and the apostrophe); other "
        "punctuation becomes a space, other letters and digits are an error",
    )
    return parser
