"""`skill-labels`: letters or SentencePiece units of transcripts, or k-means units of audio, for fairseq manifests."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from skill_fairseq.audio.manifest import Manifest, read_manifest, unstorable, write_manifest
from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.cli._common import Done, Parser, check_device, in_range, run
from skill_fairseq.clustering.calibration import choose_utterances
from skill_fairseq.files import check_output, content_sha256
from skill_fairseq.labels.codebook import FILE, Codebook
from skill_fairseq.labels.kmeans import features, fit, unit_lines
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
  skill-labels manifests/train.tsv --units kmeans --teacher hubert_base_ls960.pt --layer 9 --out units --codebook-only

writes, for each manifest SPLIT.tsv, OUT/SPLIT.tsv (with an absolute root), OUT/SPLIT.wrd (words) and OUT/SPLIT.ltr
or .spm (units, fairseq's task.labels), and for all of them OUT/dict.ltr.txt, or OUT/dict.spm.txt and OUT/spm.model.
OUT is then task.data of a run with config/finetune.

The first manifest is the training set: the units are its. Transcripts are LibriSpeech's *.trans.txt (name, space,
text), or a table with tabs whose first line names the columns, as Common Voice's does: path (or utterance, ...) and
sentence, text or transcript (another one by --column); two columns without such a line are path or name, and text.
The audio is not looked at.

With --units kmeans the audio alone is: OUT/codebook.safetensors gets centroids of the teacher's states, for the
objective masked_units, and OUT/SPLIT.km and OUT/dict.km.txt the units of every frame, for fairseq's hubert_pretraining
(task.label_dir). Without --teacher they are units of MFCC, and there is no codebook. --codebooks N quantises N times,
each time what is left; their labels are km0, km1, ...
"""

PRINTS = {
    "out": "folder written",
    "labels": "endings of the label files; none with --codebook-only",
    "units": "number of units",
    "splits": "counts for each manifest; names of recordings too short for CTC",
    "variance_left": "fraction of the frames' variance left by each codebook; null without k-means",
    "codebook": "path for the objective masked_units, or null",
    "overrides": "settings that a training takes them by",
}


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    _check_kind(args)
    if args.units == "kmeans":
        return _kmeans(args)
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
    splits = {}
    counts = Counter(unit for row in labels[0] for unit in row)
    for manifest, split, rows in zip(manifests, texts, labels):
        target = args.out / manifest.source.name
        if target.resolve() != manifest.source.resolve():
            write_manifest(target, manifest.root, manifest.paths, manifest.sizes)
        write_lines(target.with_suffix(".wrd"), split)
        write_lines(target.with_suffix(f".{units.labels}"), (" ".join(row) for row in rows))
        splits[manifest.source.stem] = _print_split(manifest, split, rows, units, args.time_reduction)
    write_units(args.out, units, counts)
    overrides = [f"task.data={args.out.resolve()}", f"task.labels={units.labels}"]
    print(f"{args.out}: use it with {' '.join(map(shell_quote, overrides))}")
    return Done(
        {
            "out": str(args.out),
            "labels": [units.labels],
            "units": len(units.symbols),
            "splits": splits,
            "variance_left": None,
            "codebook": None,
            "overrides": overrides,
        }
    )


def _check_kind(args: argparse.Namespace) -> None:
    """Options of the other kind of units, and what each kind needs."""
    kmeans = args.units == "kmeans"
    names = ("transcripts", "column", "characters") if kmeans else ("teacher", "layer", "codebooks", "codebook_only")
    given = [name for name in names if getattr(args, name) not in (None, False)]
    if given:
        option = "--" + given[0].replace("_", "-")
        remedy = "leave it out" if kmeans else "leave it out, or give --units kmeans"
        raise ValueError(f"{option}: does nothing with --units {args.units}; {remedy}")
    if not kmeans and args.transcripts is None:
        raise ValueError("the following arguments are required: --transcripts; see skill-labels --help")
    if (args.teacher is None) != (args.layer is None):
        missing = "--layer" if args.layer is None else "--teacher"
        raise ValueError(f"{missing}: not given; --teacher and --layer say together whose states are clustered")
    if args.codebook_only and args.teacher is None:
        raise ValueError("--codebook-only: units of MFCC have no codebook; give --teacher and --layer")
    if args.vocabulary_size is None:
        args.vocabulary_size = 500 if kmeans else 1000


def _kmeans(args: argparse.Namespace) -> Done:
    """k-means of the first manifest's frames, and the units of all manifests."""
    require("--units kmeans", "sklearn")
    manifests = [read_manifest(path) for path in args.manifests]
    count = args.codebooks or 1
    kinds = ["km"] if count == 1 else [f"km{n}" for n in range(count)]
    written = [] if args.teacher is None else [FILE]
    if not args.codebook_only:
        written += [f"dict.{kind}.txt" for kind in kinds]
        written += [f"{manifest.source.stem}.{kind}" for manifest in manifests for kind in kinds]
    for name in written:
        check_output(args.out / name, "--out", [*args.manifests, *([args.teacher] if args.teacher else [])])
    encoder, layer = None, args.layer or 0
    if args.teacher is not None:
        check_device(args.device)
        encoder = load_encoder(args.teacher, args.device, args.trust)
        if layer > encoder.config.encoder_layers:
            raise ValueError(f"--layer: {layer}, but {args.teacher} has {encoder.config.encoder_layers} layers")
    rate = 16000 if encoder is None else encoder.config.sample_rate
    chosen = choose_utterances(manifests[0], args.max_seconds, None, args.seed, rate)
    files = tqdm([manifests[0].files[i] for i in chosen], desc="encoding", unit="utt", disable=None)
    frames = torch.cat(list(features(files, encoder, layer))).numpy()
    centroids, scale, left = fit(frames, args.vocabulary_size, count, args.seed)
    shares = ", ".join(f"{share:.1%}" for share in left)
    print(f"units: {count} x {args.vocabulary_size} of {len(frames)} frames; of the variance is left {shares}")
    if args.teacher is not None:
        book = Codebook(centroids, scale, layer, args.teacher.name, content_sha256(args.teacher))
        book.save(args.out / FILE)
        print(f"{args.out / FILE}: for the objective masked_units, its field codebooks")
    splits: dict[str, Any] = {}
    for manifest in [] if args.codebook_only else manifests:
        files = tqdm(manifest.files, desc=manifest.source.name, unit="utt", disable=None)
        rows = [unit_lines(x, centroids, scale) for x in features(files, encoder, layer)]
        for kind, lines in zip(kinds, zip(*rows)):
            write_lines(args.out / f"{manifest.source.stem}.{kind}", lines)
        splits[manifest.source.stem] = {"recordings": len(rows)}
    overrides: list[str] = []
    if not args.codebook_only:
        for kind in kinds:
            write_lines(args.out / f"dict.{kind}.txt", (f"{unit} 1" for unit in range(args.vocabulary_size)))
        label_rate = 100 if encoder is None else rate / encoder.config.downsampling
        overrides = [
            f"task.label_dir={args.out}",
            f"task.labels=[{','.join(kinds)}]",
            f"task.label_rate={label_rate:g}",
        ]
        print(f"{args.out}: use it with {' '.join(map(shell_quote, overrides))}")
    return Done(
        {
            "out": str(args.out),
            "labels": [] if args.codebook_only else kinds,
            "units": args.vocabulary_size,
            "splits": splits,
            "variance_left": left,
            "codebook": str(args.out / FILE) if args.teacher else None,
            "overrides": overrides,
        }
    )


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
) -> dict[str, Any]:
    """Prints the counts of a split, and returns them."""
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
    counts = {"recordings": len(texts), "words": words, "units": count, "unknown": unknown}
    return {**counts, "too_short": [manifest.paths[i] for i in short]}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-labels",
        description="Write letter or SentencePiece labels and dictionaries for fine-tuning with fairseq's CTC models.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add("manifests", type=Path, nargs="+", metavar="MANIFEST", help="manifests SPLIT.tsv, the training set's first")
    add("--transcripts", type=Path, nargs="+", metavar="PATH", help="transcripts: files, or folders of *.trans.txt")
    add("--column", metavar="NAME", help="name of the tables' column of texts (default: sentence, text or transcript)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    kind = parser.add_mutually_exclusive_group()
    units = ["letters", "unigram", "bpe", "kmeans"]
    kind.add_argument("--units", choices=units, default="letters", help="kind of units (default: letters)")
    kind.add_argument("--units-of", type=Path, metavar="DIR", help="folder of an earlier call, whose units serve again")
    size = in_range(int, least=1, most=10_000_000)
    add(
        "--vocabulary-size",
        type=size,
        metavar="N",
        help="number of SentencePiece pieces (default: 1000) or k-means units (500)",
    )
    add(
        "--time-reduction",
        type=in_range(int, least=1, most=100),
        metavar="N",
        default=1,
        help="number of frames that the encoder makes one of, its model.time_reduction, by which recordings are too "
        "short for CTC (default: 1)",
    )
    add("--case", choices=["upper", "lower", "keep"], default="upper", help="case of the labels (default: upper)")
    add(
        "--characters",
        metavar="CHARS",
        help="characters to keep, after the change of case (default: every letter and the apostrophe); other "
        "punctuation becomes a space, other letters and digits are an error",
    )
    audio = parser.add_argument_group("for --units kmeans")
    add = audio.add_argument
    add(
        "--teacher",
        type=Path,
        metavar="FILE",
        help="file or folder of the encoder whose states are clustered (default: none, MFCC)",
    )
    add(
        "--layer",
        type=in_range(int, least=0),
        metavar="N",
        help="number of the teacher's layer; HuBERT Base's units are of layer 9",
    )
    add(
        "--codebooks",
        type=in_range(int, least=1, most=64),
        metavar="N",
        help="number of codebooks, each of what is left (default: 1)",
    )
    add("--codebook-only", action="store_true", help="no labels, which the objective masked_units does not need")
    add(
        "--max-seconds",
        type=in_range(float, above=0, endless=True),
        default=10_000.0,
        metavar="S",
        help="most audio of the first manifest that is clustered, seconds; inf: all (default: 10,000)",
    )
    parser.add_seed("the choice of audio and of k-means", default=1)
    parser.add_device()
    parser.add_trust()
    return parser
