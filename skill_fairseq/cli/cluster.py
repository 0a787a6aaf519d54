"""`skill-cluster`: groups of similar teacher layers, for the distillation to follow."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skill_fairseq.audio.manifest import check_manifest, read_manifest
from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.cli._common import Done, Parser, check_device, in_range, run
from skill_fairseq.clustering import linkage
from skill_fairseq.clustering.calibration import choose_utterances, layer_similarity
from skill_fairseq.clustering.config_file import format_groups, merge_groups, read_config
from skill_fairseq.clustering.plot import plot_clusters
from skill_fairseq.clustering.similarity import CHEAP_MEASURES, MEASURES, OF_ANY_WIDTH, check_widths
from skill_fairseq.files import check_output, content_sha256, write_file, write_json
from skill_fairseq.messages import printable, remedy_for
from skill_fairseq.objectives.groups import Layer, layer_name, layer_of
from skill_fairseq.objectives.teacher import check_alike
from skill_fairseq.text_tables import aligned
from skill_fairseq.versions import versions

EPILOG = """measures (distances between two layers, over all frames of the calibration set):
  cka_minibatch  1 - linear CKA, unbiased estimate on blocks of frames (default)
  cka            1 - linear CKA, exact from covariances; slower, and keeps 0.4 GB for Base, 2.7 GB for Large
  cosine         mean of 1 - cos
  l1, l2         mean absolute difference, root mean square difference
  loss           l1 + cosine: the distillation loss itself

examples:
  skill-cluster --teacher WavLM-Base+.pt --manifest data/train.tsv
  skill-cluster --teacher WavLM-Base+.pt --manifest data/train.tsv --config mine.yaml --num-groups 5
  skill-cluster --teacher HF_FOLDER --manifest data/train.tsv --silhouette 3 6 --neighbours-only --compare
  skill-cluster --teacher WavLM-Base+.pt WavLM-Large.pt --manifest data/train.tsv

Layers of several teachers are clustered together; 1/4 is layer 4 of the second teacher. They must hear the same
waveforms; if their widths differ, only cka_minibatch and cka compare them.

writes OUT/groups.yaml (for criterion.groups_file), OUT/clusters.json (all distances, the tree, the settings)
and OUT/clusters.png (needs matplotlib). With --config the groups go into that training config too; its
comments stay. The same audio gives the same groups, whatever the manifest's order and the batch size.
Recordings of more than a minute are encoded in pieces of equal length.
"""

PRINTS = {
    "groups": "layers of each group",
    "layers": "layers that were clustered, in the order of the matrices",
    "measure": "measure that the groups are by",
    "linkage": "the tree, as SciPy has it",
    "cut": "how the tree was cut",
    "matrices": "distances between layers by each measure",
    "teacher": "name and SHA-256; of several teachers a list",
    "calibration": "utterances, frames and seconds that were heard, and what was skipped",
    "settings": "options that can change the result",
    "versions": "packages and their versions",
    "files": "paths of the files written",
}

DEFAULT_GROUPS = 4  # as many as DPHuBERT has target layers


def make_groups(distances: np.ndarray, args: argparse.Namespace) -> tuple[np.ndarray, linkage.Groups, dict[str, Any]]:
    """Tree, groups of indices, and how the tree was cut (for the JSON) under the command's options."""
    tree = linkage.link(distances, args.linkage, args.neighbours_only)
    if args.height is not None:
        return tree, linkage.cut_at_height(tree, args.height), {"by": "height", "height": args.height}
    cut: dict[str, Any] = {"by": "number"}
    if args.silhouette:
        groups, scores = linkage.cut_by_silhouette(tree, distances, *args.silhouette)
        cut = {"by": "silhouette", "silhouettes": scores}
    else:
        groups = linkage.cut_to_number(tree, args.num_groups)
    cut["height"] = linkage.cut_height(tree, len(groups))
    return tree, groups, cut


def format_table(distances: np.ndarray, groups: Sequence[Sequence[int]], layers: Sequence[Layer]) -> str:
    """A line a group: its layers, the mean distance within, and to the nearest other group."""
    rows = [["group", "layers", "within", "to nearest"]]
    for number, group in enumerate(groups):
        size = len(group)
        within = f"{distances[np.ix_(group, group)].sum() / (size * (size - 1)):.4f}" if size > 1 else "-"
        gaps = [distances[np.ix_(group, other)].mean() for other in groups if other is not group]
        nearest = f"{min(gaps):.4f}" if gaps else "-"
        rows.append([str(number), _ranges([layers[i] for i in group]), within, nearest])
    return aligned(rows, left=2)


def format_comparison(
    matrices: dict[str, np.ndarray], number: int, layers: Sequence[Layer], args: argparse.Namespace
) -> str:
    """As many groups by each measure, under the same linkage."""
    rows = []
    for measure, distances in matrices.items():
        if args.linkage != "ward" or measure in linkage.EUCLIDEAN_MEASURES:
            tree = linkage.link(distances, args.linkage, args.neighbours_only)
            groups = linkage.cut_to_number(tree, number)
            rows.append([f"  {measure}", " | ".join(_ranges([layers[i] for i in group]) for group in groups)])
    return f"{number} groups by each measure:\n{aligned(rows, left=2)}"


def _ranges(layers: Sequence[Layer]) -> str:
    """Ascending layers, runs shortened: 1-3, 5, 1/2-4."""
    runs: list[list[tuple[int, int]]] = []
    for teacher, layer in map(layer_of, layers):
        if runs and (teacher, layer - 1) == runs[-1][-1]:
            runs[-1].append((teacher, layer))
        else:
            runs.append([(teacher, layer)])
    return ", ".join(f"{layer_name(*run[0])}" + (f"-{run[-1][1]}" if len(run) > 1 else "") for run in runs)


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    args.teacher = [path.absolute() for path in args.teacher]  # a folder may be given as "."
    _check_options(args)
    manifest = read_manifest(args.manifest)
    encoders = [load_encoder(path, args.device, args.trust) for path in args.teacher]
    shapes = [encoder.config for encoder in encoders]
    check_alike(shapes, [str(path) for path in args.teacher], "--teacher")
    every = [(k, i) for k, shape in enumerate(shapes) for i in range(shape.encoder_layers + 1)]
    kept = [index for index, (_, i) in enumerate(every) if i or not args.no_layer_0]
    layers = [layer_name(*every[index]) for index in kept]
    widths = [shape.encoder_embed_dim for shape in shapes]
    check_widths([args.measure], widths)
    make_groups(1.0 - np.eye(len(layers)), args)  # options out of range fail before the work

    rate = shapes[0].sample_rate
    chosen = choose_utterances(manifest, args.max_seconds, args.max_utterances, args.seed, rate)
    check_manifest(manifest, chosen)
    files = [manifest.files[i] for i in chosen]
    seconds = sum(manifest.sizes[i] for i in chosen) / rate
    skipped: list[Path] = []
    measures = MEASURES if args.compare else tuple(dict.fromkeys([*CHEAP_MEASURES, args.measure]))
    if len(set(widths)) > 1:
        measures = tuple(measure for measure in measures if measure in OF_ANY_WIDTH)
    with tqdm(total=round(seconds, 1), desc="encoding", unit="s audio", disable=None) as bar:
        similarity = layer_similarity(encoders, files, measures, args.batch_size, bar.update, skipped)
    unusable = [i for i, file in zip(chosen, files) if file in skipped]
    if unusable:
        print(f"skipped {len(unusable)} of {len(chosen)} recordings, see above", file=sys.stderr)
        chosen = [i for i in chosen if i not in unusable]
        seconds = sum(manifest.sizes[i] for i in chosen) / rate
    matrices = {measure: matrix[np.ix_(kept, kept)] for measure, matrix in similarity.distances().items()}

    distances = matrices[args.measure]
    tree, groups, cut = make_groups(distances, args)
    named = [[layers[i] for i in group] for group in groups]
    calibration = f"{len(chosen)} utterances, {seconds:.1f} s, {similarity.num_frames} frames"
    names = " and ".join(printable(path.name) for path in args.teacher)
    title = (
        f"{names}: {len(groups)} groups of {len(layers)} layers by {args.measure}, "
        f"{args.linkage} linkage{' of neighbours' if args.neighbours_only else ''}"
    )
    print(f"{title}\n({calibration})\n\n{format_table(distances, groups, layers)}\n")
    if args.compare:
        print(f"{format_comparison(matrices, len(groups), layers, args)}\n")

    _write_groups(args.out / "groups.yaml", named, f"{title} ({calibration})")
    teachers = [{"name": path.name, "sha256": content_sha256(path)} for path in args.teacher]
    record = {
        "groups": named,
        "layers": layers,
        "measure": args.measure,
        "linkage": tree.tolist(),
        "cut": cut,
        "matrices": {measure: matrix.tolist() for measure, matrix in matrices.items()},
        "teacher": teachers if len(teachers) > 1 else teachers[0],
        "calibration": {
            "manifest": args.manifest.name,
            "utterances": [manifest.paths[i] for i in chosen],
            "num_utterances": len(chosen),
            "num_frames": similarity.num_frames,
            "seconds": seconds,
            "skipped": [manifest.paths[i] for i in unusable],
        },
        "settings": _settings(args),
        "versions": versions("scipy"),
    }
    write_json(args.out / "clusters.json", record)
    written = [args.out / "groups.yaml", args.out / "clusters.json"]
    if args.picture is not None:
        plot_clusters(args.picture, distances, tree, groups, cut["height"], layers, args.measure, title)
        written.append(args.picture)
    if args.config:
        write_file(args.config, merge_groups(read_config(args.config), named, str(args.config)))
        written.append(args.config)
    print(f"wrote {', '.join(map(str, written))}")
    print(f"to train with these groups: fairseq-hydra-train ... 'criterion.groups={format_groups(named, ',')}'")
    return Done({**record, "files": list(map(str, written))})


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Options that can change the result; JSON has no infinity, so no limit is null."""
    names = "linkage num_groups height silhouette neighbours_only no_layer_0 max_seconds max_utterances seed"
    settings = {name: getattr(args, name) for name in [*names.split(), "batch_size", "device"]}
    return {name: None if value == float("inf") else value for name, value in settings.items()}


def _write_groups(path: Path, groups: Sequence[Sequence[Layer]], about: str) -> None:
    text = (
        f"# {about}\n"
        "# Written by skill-cluster. Train with criterion.groups_file=<this file>, or by the override\n"
        f"# 'criterion.groups={format_groups(groups, ',')}'\n"
        f"groups: {format_groups(groups)}\n"
    )
    write_file(path, text)


def _check_options(args: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    linkage.check_linkage(args.linkage, args.measure)
    check_device(args.device)
    if args.neighbours_only and len(args.teacher) > 1:
        raise ValueError(
            f"--neighbours-only: with {len(args.teacher)} teachers, layers of which are not neighbours; leave it out, "
            "or give one teacher"
        )
    inputs = [*args.teacher, args.manifest]
    if args.config:
        merge_groups(read_config(args.config), [[0]], str(args.config))
        check_output(args.config, "--config", inputs)
    args.picture = args.out / "clusters.png"
    if find_spec("matplotlib") is None:
        print(f"no {args.picture}: matplotlib is not installed; run {remedy_for('matplotlib')}", file=sys.stderr)
        args.picture = None
    for name in ("groups.yaml", "clusters.json", "clusters.png"):
        check_output(args.out / name, "--out", [*inputs, *([args.config] if args.config else [])])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-cluster",
        description="Cluster a teacher's layers by the similarity of their hidden states on a little speech.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add(
        "--teacher",
        required=True,
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="files or folders that load_encoder reads",
    )
    parser.add_trust()
    add("--manifest", required=True, type=Path, metavar="MANIFEST", help="audio to choose the calibration set from")
    add("--out", type=Path, default=Path("clusters"), metavar="DIR", help="folder to write (default: clusters)")
    add("--config", type=Path, metavar="YAML", help="training config that gets criterion.groups")
    add(
        "--measure",
        choices=MEASURES,
        default="cka_minibatch",
        help="distance between layers, see below (default: cka_minibatch)",
    )
    add(
        "--linkage",
        choices=linkage.LINKAGES,
        default="average",
        help="linkage of the tree; ward only with l2 (default: average)",
    )
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument(
        "--num-groups",
        type=in_range(int, least=1, most=1000),
        default=DEFAULT_GROUPS,
        metavar="K",
        help=f"number of groups (default: {DEFAULT_GROUPS}, as many as DPHuBERT has target layers)",
    )
    cut.add_argument(
        "--height",
        type=in_range(float, least=0),
        metavar="H",
        help="largest distance of what is merged, in the measure's unit",
    )
    cut.add_argument(
        "--silhouette",
        type=in_range(int, least=1, most=1000),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the number of groups; the best silhouette decides",
    )
    add(
        "--neighbours-only",
        action="store_true",
        help="groups of neighbouring layers only",
    )
    add("--no-layer-0", action="store_true", help="groups without layer 0, the features before the Transformer")
    add(
        "--max-seconds",
        type=in_range(float, above=0, endless=True),
        default=600.0,
        metavar="S",
        help="most audio in all, seconds; inf: all (default: 600)",
    )
    add(
        "--max-utterances",
        type=in_range(int, least=1),
        metavar="N",
        help="largest number of utterances (default: no limit)",
    )
    parser.add_seed("the choice of utterances")
    add(
        "--batch-size",
        type=in_range(int, least=1),
        default=1,
        metavar="N",
        help="largest number of utterances encoded together; only equal lengths are (default: 1)",
    )
    parser.add_device()
    add("--compare", action="store_true", help="as many groups by every other measure as well")
    return parser
