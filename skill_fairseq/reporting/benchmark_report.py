"""The report of a benchmark: which method does better, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skill_fairseq.comparison.layer_distance import SHOWN
from skill_fairseq.comparison.summary import OVERALL
from skill_fairseq.comparison.table import introduction, sparsity_tables, verdicts
from skill_fairseq.reporting import page, pictures
from skill_fairseq.reporting.run_folder import RunFolder
from skill_fairseq.reporting.run_report import as_yaml, cluster_section

Row = Mapping[str, Any]


def benchmark_report(folder: RunFolder, out: Path) -> str:
    """Builds the page; writes its pictures into a folder.

    Args:
        folder: holds the content of results.json from examples/benchmark/run.py.
        out: folder of the pictures.
    """
    summary = folder.benchmark
    assert summary is not None
    missing = list(folder.missing)
    if summary.get("found") != summary.get("wanted"):
        missing.append(f"{summary['wanted'] - summary['found']} of {summary['wanted']} results are not there yet")
    missing += [f"{name}: failed, see runs/{name}/log" for name in summary.get("failed", [])]
    sections = [("Verdict", page.bullets([line.lstrip("- ") for line in verdicts(summary)]))]
    rows: list[Row] = summary["rows"]
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        title = "Mean over sparsities" if sparsity == OVERALL else f"Sparsity {sparsity:g}"
        here = [row for row in rows if row["sparsity"] == sparsity]
        sections.append((title, _sparsity(here, summary, sparsity, out)))
    sections.append(("Not distilled", page.table(*sparsity_tables(rows, summary)["references"])))
    if folder.clusters is not None:
        sections.append(("Layer similarity and groups", cluster_section(folder.clusters, out)))
    versions = page.table(list(summary["versions"]), [list(summary["versions"].values())])
    settings = page.folded("Settings", page.code(as_yaml(summary["settings"])))
    sections.append(("Settings and versions", versions + settings))
    sections.append(("How to repeat it", _repeat(rows)))
    if missing:
        sections.append(("Left out", page.bullets(missing)))
    about = page.paragraph(introduction(summary))
    return page.page(f"Benchmark: {folder.path.resolve().name}", about, sections)


def _sparsity(rows: Sequence[Row], summary: Mapping[str, Any], sparsity: Any, out: Path) -> str:
    baseline, shown = summary["baseline"], []
    for task in summary["tasks"]:
        lines = [
            (row["method"], pictures.in_percent(*row["difference"][task]["estimate"]))
            for row in rows
            if row["method"] != baseline and row["difference"]
        ]
        if lines:
            label = f"{task}, {summary['tasks'][task]['metric']}: points above {baseline}"
            path = pictures.file_of(out, "difference", task, str(sparsity))
            pictures.forest(path, lines, label, 0.0, zoom=True)
            alt = f"difference of each method to {baseline} on {task}"
            why = summary["tasks"][task]["no_interval"]
            caption = f"no interval: {why}" if why else "in colour: intervals that exclude 0"
            if pictures.beyond(lines, 0.0):
                caption += "; \u25c2 \u25b8: beyond the axis"
            shown.append(page.figure(path, alt, caption))
    for kind, name in SHOWN.items():
        label = f"{name} to the teacher"
        found = {row["method"]: row["layers"][kind] for row in rows if kind in row["layers"]}
        curves = {method: (np.linspace(0, 1, len(values)).tolist(), values) for method, values in found.items()}
        if not curves:
            continue
        path = pictures.file_of(out, "distance", kind, str(sparsity))
        pictures.curves(path, curves, label, xlabel="share of the depth", log=True)
        shown.append(page.figure(path, f"{label} of each method, by layer"))
    tables = sparsity_tables(rows, summary)
    wanted = [("probes", "Probes"), ("distance", "Distance to the teacher"), ("costs", "Size and time")]
    parts = []
    for name, title in wanted:
        if name in tables:
            parts.append(f"<h3>{title}</h3>" + page.table(*tables[name], words_last=name == "probes"))
    return page.figures(shown) + "".join(parts)


def _repeat(rows: Sequence[Row]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sparsities = [f"{value:g}" for value in dict.fromkeys(row["sparsity"] for row in rows) if value != OVERALL]
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    command = ["python", "examples/benchmark/run.py", "OUT", "--grid", "GRID", "--name", "NAME"]
    command += ["--methods", *methods, "--sparsities", *sparsities, "--seeds", *map(str, seeds)]
    text = (
        "GRID and NAME: a grid whose stages have the settings above; examples/benchmark/grid.yaml is the shipped one. "
        "Curves and kept units of one run: skill-report OUT/runs/METHOD-SPARSITY-SEED."
    )
    return page.command(command) + page.paragraph(text)
