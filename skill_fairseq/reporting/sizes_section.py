"""Sizes of an elastic run in one picture: cost against the distance to the teacher, and against probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.source import build_encoder
from skill_fairseq.comparison.costs import SECONDS, costs
from skill_fairseq.comparison.layer_distance import layer_distances
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.reporting import page, pictures

DEDICATED = "dedicated"
"""Subfolder of a run with students that were each trained for one size."""
Point = Dict[str, Any]


def size_files(folder: Path) -> Dict[str, List[Path]]:
    """Students of several sizes, as ``skill-shrink --size`` names them, and those in ``dedicated/``."""
    cut = [path for path in folder.glob("*-0.*.safetensors") if "elastic" in read_source(path).provenance]
    if len(cut) < 2:
        return {}
    return {"one elastic run": sorted(cut), "a run for each size": sorted((folder / DEDICATED).glob("*.safetensors"))}


def sizes_section(
    files: Mapping[str, Sequence[Path]],
    teacher: Optional[SpeechEncoder],
    recordings: Sequence[Path],
    probes: Sequence[Mapping[str, Any]],
    out: Path,
) -> str:
    """Table and pictures: cost against distance, and against each probe.

    Args:
        files: kind of run to its students.
        teacher: reference of the distances; None: no distances.
        recordings: audio for the distances.
        probes: entries of probe.json, by file stem of the students.
        out: folder of the pictures.

    Raises:
        ValueError, OSError: a student or recording cannot be read.
    """
    points: Dict[str, List[Point]] = {}
    tasks = list(dict.fromkeys(entry["task"] for entry in probes))
    for kind, paths in files.items():
        for path in paths:
            encoder = build_encoder(read_source(path), path).eval()
            point: Point = {"name": path.stem, **costs(encoder, repeats=3)}
            if teacher is not None and recordings:
                layers = layer_distances(encoder, teacher, recordings).layers["cka"]
                point["distance"] = sum(layers) / len(layers)
            known = {entry["task"]: 100 * entry["value"] for entry in probes if entry["model"] == path.stem}
            points.setdefault(kind, []).append({**point, **{f"probe {task}": v for task, v in known.items()}})
    labels = {"distance": "mean 1 - CKA to the teacher, lower is better"}
    labels.update({f"probe {task}": f"{task}, %" for task in tasks})
    shown, columns = [], [name for name in labels if any(name in p for each in points.values() for p in each)]
    for column in columns:
        lines = {}
        for kind, each in points.items():
            found = sorted((p["macs"] / 1e9, p[column]) for p in each if column in p)
            if found:
                lines[kind] = [x for x, _ in found], [y for _, y in found]
        path = pictures.pareto(pictures.file_of(out, "sizes", column), lines, labels[column])
        shown.append(page.figure(path, f"{labels[column]}, against multiply-accumulates, for every size"))
    head = ["student", "trained by", "parameters", f"G MACs, {SECONDS:g} s", "processor ms", *columns]
    rows = [
        [p["name"], kind, f"{p['parameters']:,}", f"{p['macs'] / 1e9:.3f}", f"{1000 * p['cpu_seconds']:.1f}"]
        + [f"{p[column]:.4f}" if column in p else "-" for column in columns]
        for kind, each in points.items()
        for p in sorted(each, key=lambda point: point["macs"])
    ]
    return page.table(head, rows) + page.figures(shown)
