"""Single runs as a table, small enough for a repository and complete enough to recompute every interval."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skill_fairseq.comparison.layer_distance import SHOWN
from skill_fairseq.files import atomic_write
from skill_fairseq.probing.evaluate import outcomes


def run_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A run's row: its identity, its results in each task and its distance to the teacher, also by speaker."""
    groups = result["groups"] or ()
    seconds = result["made"]["seconds"]
    row: dict[str, Any] = {
        "method": result["method"],
        "sparsity": result["sparsity"],
        "seed": result["seed"],
        "budget": result.get("budget", "parameters"),
        "groups": result.get("recipe") or " ".join("{" + ",".join(map(str, group)) + "}" for group in groups),
    }
    for task, entry in result["probes"].items():
        row[task] = entry["value"]
        row.update(_by_speaker(task, *outcomes(entry)))
    distances = result["distances"]
    for kind in SHOWN:
        if kind not in distances["recordings"]:
            continue
        values = np.array(distances["recordings"][kind])
        row[kind] = float(values.mean())
        row.update(_by_speaker(kind, values, distances["speakers"] or []))
    row["parameters"], row["macs"] = result["costs"]["parameters"], result["costs"]["macs"]
    row["milliseconds"] = 1000 * result["costs"]["cpu_seconds"]
    row["actual sparsity"] = result["made"]["sparsity"]["actual"]
    row["seconds"] = sum(seconds.values())
    row["training cpu seconds"] = result["made"].get("cpu_seconds", "")
    row["cpu"], row["commit"] = result["cpu"], result["commit"]
    return row


def _by_speaker(name: str, values: np.ndarray, speakers: Sequence[str]) -> dict[str, float]:
    """The mean over each speaker's values; empty if speakers are unknown."""
    who = np.array(speakers)
    return {f"{name}, {s}": float(values[who == s].mean()) for s in sorted(set(speakers))}


def write_runs(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """CSV with one run per row, in the given order; numbers have six decimals."""
    rows = [run_row(result) for result in results]
    head = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, head, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{v:.6f}".rstrip("0").rstrip(".") if isinstance(v, float) else v for k, v in row.items()}
            )
