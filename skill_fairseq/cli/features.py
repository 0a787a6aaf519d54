"""`skill-features`: an encoder's states, or MFCC, of all recordings of a manifest, for k-means and the like."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skill_fairseq.audio.manifest import Manifest, check_manifest, load_audio, logger, read_manifest
from skill_fairseq.cli._common import Done, Parser, check_device, in_range, layer_numbers, run
from skill_fairseq.features.extract import FIXED, FixedFeatures, StateFeatures
from skill_fairseq.features.shards import ShardWriter, shard_range
from skill_fairseq.files import content_sha256, sha256
from skill_fairseq.versions import versions

EPILOG = """examples:
  skill-features wavlm.pt manifests/train.tsv features --layers 9
  skill-features student.safetensors manifests/train.tsv features --layers all
  skill-features mfcc manifests/train.tsv round1
  skill-features wavlm.pt manifests/train.tsv features --layers 9 --shards 4 --rank 0      (and --rank 1 to 3 elsewhere)

writes OUT/SPLIT_RANK_SHARDS.npy, the (frames, D) features of all recordings one after another, and
OUT/SPLIT_RANK_SHARDS.len, a line with the frames of each recording: what fairseq's
examples/hubert/simple_kmeans/learn_kmeans.py and dump_km_label.py read. Several layers go into OUT/layer_N.
OUT/SPLIT_RANK_SHARDS.json says what it all was made with.

The same command goes on where an earlier one was ended. Recordings that cannot be read get 0 frames, so that lines
stay those of the manifest. Recordings longer than --chunk-seconds are encoded in chunks of that length, each with
--context-seconds on either side; the convolutions' features are those of the whole recording.
"""

PRINTS = {
    "files": "paths of the .npy files; each has a .len beside it",
    "recordings": "number of recordings of this shard",
    "frames": "number of frames in a layer",
    "width": "features in a frame",
    "unreadable": "recordings without frames",
    "settings": "what the features depend on: model and manifest with SHA-256, layers, chunks, dtype, shard",
    "versions": "packages and their versions",
}


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    check_device(args.device)
    manifest = read_manifest(args.manifest)
    chosen = shard_range(len(manifest), args.shards, args.rank)
    check_manifest(manifest, chosen)
    features, layers, settings = _features(args)
    name = f"{manifest.source.stem}_{args.rank}_{args.shards}"
    folders = [args.out] if len(layers) < 2 else [args.out / f"layer_{layer}" for layer in layers]
    settings["manifest sha256"] = sha256(args.manifest)
    writer = ShardWriter(args.out, folders, name, features.width, settings, args.dtype)
    if writer.finished:
        print(f"{args.out}: {name} is there already")
    else:
        before = len(writer.lengths)
        _write(writer, features, manifest, chosen)
        if before:
            print(f"went on after {before} of {len(chosen)} recordings")
    lost = [manifest.paths[i] for i, length in zip(chosen, writer.lengths) if length is None]
    frames = sum(length or 0 for length in writer.lengths)
    where = "" if len(layers) < 2 else f" for each of layers {', '.join(map(str, layers))}"
    print(f"{args.out}: {len(chosen)} recordings, {frames:,} frames of {features.width} features{where}, {args.dtype}")
    if lost:
        print(f"{len(lost)} recordings could not be read and have no frames, the first: {lost[0]}", file=sys.stderr)
    counts = {"recordings": len(chosen), "frames": frames, "width": features.width, "unreadable": lost}
    files = [str(path) for path in writer.targets]
    return Done({"files": files, **counts, "settings": settings, "versions": versions()})


def _write(
    writer: ShardWriter, features: FixedFeatures | StateFeatures, manifest: Manifest, chosen: Sequence[int]
) -> None:
    """All recordings that are not there yet, and the files' names."""
    rate = 16000 if isinstance(features, FixedFeatures) else features.encoder.config.sample_rate
    least = 400 if isinstance(features, FixedFeatures) else features.encoder.config.receptive_field
    done = len(writer.lengths)
    seconds = [manifest.sizes[i] / rate for i in chosen]
    with tqdm(total=round(sum(seconds), 1), desc="features", unit="s audio", disable=None) as bar:
        bar.update(sum(seconds[:done]))
        for i, length in zip(chosen[done:], seconds[done:]):
            file = manifest.files[i]
            try:
                wave = load_audio(file, rate, least)
            except (OSError, ValueError) as error:
                logger.warning(f"recording skipped: {error}")
                writer.skip()
            else:
                writer.append(_finite(features(wave), file))
            bar.update(length)
    writer.finish()


def _finite(parts: Any, file: Path) -> Any:
    for states in parts:
        if not all(np.isfinite(state).all() for state in states):
            raise ValueError(f"{file}: features are NaN or infinite, expected finite numbers; weights may be damaged")
        yield states


def _features(args: argparse.Namespace) -> tuple[FixedFeatures | StateFeatures, list[int], dict[str, Any]]:
    """What computes features, its layers, and what they depend on."""
    common = {"model": Path(args.model).name, "dtype": args.dtype, "shards": args.shards, "rank": args.rank}
    if args.model in FIXED:
        if args.layers is not None:
            raise ValueError(f"--layers: {args.layers}; {args.model} has none, leave it out")
        return FixedFeatures(args.model), [], common
    from skill_fairseq.checkpoints import load_encoder

    encoder = load_encoder(args.model, args.device, args.trust)
    depth = encoder.config.encoder_layers
    layers = list(range(depth + 1)) if args.layers == "all" else layer_numbers(args.layers or "", depth, "all")
    settings = {
        **common,
        "model sha256": content_sha256(args.model),
        "layers": layers,
        "chunk_seconds": args.chunk_seconds,
        "context_seconds": args.context_seconds,
    }
    return StateFeatures(encoder, layers, args.chunk_seconds, args.context_seconds), layers, settings


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-features",
        description="Write features of a manifest's recordings into .npy files.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"file or folder that load_encoder reads, or {' or '.join(FIXED)}")
    add("manifest", type=Path, metavar="MANIFEST", help="fairseq manifest SPLIT.tsv")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add("--layers", metavar="L", help="numbers of layers as in 6,9, or all; 0 is before the positional convolution")
    count = in_range(int, least=1, most=100_000)
    add(
        "--shards",
        type=count,
        default=1,
        metavar="N",
        help="number of parts that the manifest is cut into (default: 1)",
    )
    add(
        "--rank",
        type=in_range(int, least=0, most=99_999),
        default=0,
        metavar="R",
        help="number of this part, from 0 (default: 0)",
    )
    seconds = in_range(float, least=0.1, most=86_400)
    add(
        "--chunk-seconds",
        type=seconds,
        default=60.0,
        metavar="S",
        help="length encoded at a time, seconds (default: 60)",
    )
    context = in_range(float, least=0, most=86_400)
    add(
        "--context-seconds",
        type=context,
        default=10.0,
        metavar="S",
        help="context on either side of it, seconds (default: 10)",
    )
    add(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="number type of the features (default: float32)",
    )
    parser.add_device()
    parser.add_trust()
    return parser
