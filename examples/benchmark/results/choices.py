#!/usr/bin/env python3
"""One choice changed at a time: choices.png from choices.csv, python examples/benchmark/results/choices.py"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results_table import draw_dots, read_runs  # noqa: E402

MEASURES = {"l1 difference": "change in L1 to the teacher", "cka difference": "change in 1 - CKA"}


def draw(path: Path) -> None:
    """A row per choice and a panel per distance; omits choices with the same groups as the base."""
    rows = [row for row in read_runs(HERE / "choices.csv") if row["l1 difference"]]
    tried = {f"{row['choice']}: {row['tried']}": row for row in rows}
    panels = {
        label: [(name, 0, float(row[measure]), None) for name, row in tried.items()]
        for measure, label in MEASURES.items()
    }
    draw_dots(path, panels, reference=dict.fromkeys(panels, 0.0), reference_label="base: a projection for each group")


if __name__ == "__main__":
    draw(HERE / "choices.png")
