"""The report's sections on encoders: size and time, units left in each layer, distance to the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from skill_fairseq.audio.manifest import check_manifest, read_manifest
from skill_fairseq.comparison.costs import SECONDS, costs
from skill_fairseq.comparison.layer_distance import KINDS, SHOWN, LayerDistances, layer_distances
from skill_fairseq.files import size_of
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.units import units_of
from skill_fairseq.pruning.shrink import kept_tables
from skill_fairseq.reporting import page, pictures

Encoders = Mapping[str, SpeechEncoder]


def first_recordings(valid: Path, max_seconds: float, rate: int = 16000) -> tuple[list[Path], float]:
    """The first recordings of a manifest up to this much audio, at least one; and their length in seconds.

    Raises:
        ValueError, OSError: the manifest cannot be used.
    """
    manifest = read_manifest(valid)
    check_manifest(manifest)
    files: list[Path] = []
    seconds = 0.0
    for file, size in zip(manifest.files, manifest.sizes):
        if files and seconds + size / rate > max_seconds:
            break
        files.append(file)
        seconds += size / rate
    return files, seconds


def cost_section(encoders: Encoders, files: Mapping[str, Path]) -> str:
    """Table of parameters, work and time, relative to the first encoder: the teacher, if there is one."""
    found = {name: costs(encoder) for name, encoder in encoders.items()}
    first = next(iter(found.values()))
    rows = []
    for name, cost in found.items():
        rows.append(
            [
                name,
                f"{cost['parameters']:,}",
                f"{100 * cost['parameters'] / first['parameters']:.2f} %",
                f"{cost['macs'] / 1e9:.3f}",
                f"{100 * cost['macs'] / first['macs']:.1f} %",
                f"{1000 * cost['cpu_seconds']:.1f}",
                f"{first['cpu_seconds'] / cost['cpu_seconds']:.2f}",
                f"{size_of(files[name]) / 1e6:.2f}",
            ]
        )
    head = ["encoder", "parameters", "of them left", "G MACs", "of them left", "CPU ms", "times faster", "file, MB"]
    return page.table(head, rows) + page.paragraph(
        f"MACs and processor time of one forward of {SECONDS:g} s of audio; time is the minimum over several forwards, "
        f"on the machine that made this page ({first['threads']} thread{'s' * (first['threads'] > 1)})."
    )


def units_section(config: EncoderConfig, out: Path) -> str:
    """Units left in each layer: picture and tables."""
    shares: dict[str, Sequence[Optional[float]]] = {
        unit.label.partition(" (")[0]: [
            _share(*row) for row in zip(unit.by_row(unit.left(config)), unit.by_row(unit.full(config)))
        ]
        for unit in units_of(config)
        if unit.label is not None
    }
    path = pictures.kept_units(out / "units.png", shares)
    found = kept_tables(config)
    heads = found["layer"][0].index("heads")
    which = [" ".join(map(str, kept or ())) or "-" for kept in config.heads or ()]
    for line, cell in zip(found["layer"], ["which", *which]):
        line.insert(heads + 1, cell)
    tables = "".join(page.table(head, lines) for head, *lines in found.values())
    return page.figures([page.figure(path, "share of units left in each layer"), f"<div>{tables}</div>"])


def _share(left: Sequence[Optional[int]], full: Sequence[int]) -> Optional[float]:
    """The share left in one table row; None where everything was removed."""
    return None if set(left) == {None} else sum(width or 0 for width in left) / sum(full)


def distance_section(encoders: Encoders, valid: Path, max_seconds: float, groups: Any, out: Path) -> str:
    """Distance of each student's states to the teacher's.

    Args:
        encoders: "teacher" and others.
        valid: manifest of the recordings.
        max_seconds: use the first recordings up to this much audio.
        groups: layers of each group, or None.
        out: folder of the pictures.

    Raises:
        ValueError: frame rates differ.
    """
    files, seconds = first_recordings(valid, max_seconds, encoders["teacher"].config.sample_rate)
    found = {n: layer_distances(e, encoders["teacher"], files) for n, e in encoders.items() if n != "teacher"}
    number = len(next(iter(found.values())).recordings["cka"])  # those that can be read
    shown = []
    for kind, label in SHOWN.items():
        lines = {name: (d.teacher_layers, d.layers[kind]) for name, d in found.items() if kind in d.layers}
        if not lines:
            continue
        path = pictures.curves(out / f"distance_{kind}.png", lines, label, xlabel="layer of the teacher")
        shown.append(page.figure(path, f"{label} between student and teacher, by layer"))
    text = (
        f"States of layers at the same relative depth, on {number} recordings of {valid.name} ({seconds:.1f} s, "
        f"{next(iter(found.values())).num_frames} frames), without projections. L1 is shown for raw "
        "states and for states normalised to zero mean and unit variance per frame; 1 - CKA, over a recording's "
        "frames, ignores rotation and scale, and is the only distance between different widths. Layer 0 precedes the "
        "Transformer."
    )
    return page.paragraph(text) + page.figures(shown) + _distance_table(found, groups)


def _distance_table(found: Mapping[str, LayerDistances], groups: Any) -> str:
    """One row per teacher layer that a student's layer was compared with."""
    labels = {"l1": "L1", "l1_normalized": "L1 normalised", "cos": "1 - cos", "cka": "1 - CKA"}
    columns = [(name, d, kind) for name, d in found.items() for kind in KINDS if kind in d.layers]
    number = {layer: str(g) for g, group in enumerate(groups or []) for layer in group}
    rows = []
    for layer in sorted({layer for distances in found.values() for layer in distances.teacher_layers}):
        rows.append([str(layer), number.get(layer, "-")])
        for _, d, kind in columns:
            values = [f"{v:.4f}" for v, at in zip(d.layers[kind], d.teacher_layers) if at == layer]
            rows[-1].append(", ".join(values) or "-")
    return page.table(["layer", "group", *(f"{name}: {labels[kind]}" for name, _, kind in columns)], rows)
