#!/usr/bin/env python3
"""Targets by parameters, MACs and milliseconds at equal measured time: latency_table.csv and latency.png.

python examples/benchmark/results/latency.py OUT    times the students of OUT (grid cost) in latency.csv, then as below
python examples/benchmark/results/latency.py        compares by latency.csv (times) and cost.csv (runs)
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grids import at_equal, table  # noqa: E402
from results_table import read_runs, write_table  # noqa: E402

from skill_fairseq import load_encoder  # noqa: E402
from skill_fairseq.files import atomic_write, read_json  # noqa: E402
from skill_fairseq.modules.size import widths_of  # noqa: E402
from skill_fairseq.pruning.latency import LatencyCost  # noqa: E402
from skill_fairseq.reporting.pictures import STYLES, drawing  # noqa: E402

Row = Mapping[str, str]
METHODS = {"by_parameters": "parameters", "by_macs": "MACs", "by_time": "milliseconds"}
"""Methods of the grid, the baseline first, and what their targets are of."""
TIMES = (40, 31, 21)
"""Milliseconds at which methods are compared."""
SECONDS, ROUNDS = 10.0, 20
"""Length of the utterance; how often each student is timed, all in turn, of which the minimum counts."""
HEAD = ["method", "sparsity", "seed", "table_ms", "measured_ms"]


def measure(out: Path) -> None:
    """Writes latency.csv: each student's time on this machine, one thread, and by OUT/latency.json."""
    torch.set_num_threads(1)
    cost = LatencyCost(read_json(out / "latency.json"))
    runs = [read_json(file) for file in sorted(out.glob("runs/*/result.json"))]
    encoders = [load_encoder(file.parent / "student.safetensors") for file in sorted(out.glob("runs/*/result.json"))]
    audio = torch.randn(1, round(SECONDS * 16000), generator=torch.Generator().manual_seed(0))
    times = np.full((ROUNDS, len(encoders)), np.inf)
    with torch.inference_mode():
        for encoder in encoders:
            encoder.prepare()(audio)
        for turn in times:
            for i, encoder in enumerate(encoders):
                began = time.perf_counter()
                encoder(audio)
                turn[i] = 1000 * (time.perf_counter() - began)
    with atomic_write(HERE / "latency.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEAD)
        for run, encoder, measured in zip(runs, encoders, times.min(0)):
            expected = float(cost(encoder.config, widths_of(encoder.config)))
            who = run["method"], run["sparsity"], run["seed"]
            writer.writerow([*who, f"{expected:.2f}", f"{measured:.2f}"])


def timed(runs: Sequence[Row], times: Sequence[Row]) -> list[dict[str, str]]:
    """Runs with the measured time of their students, without those that have none."""
    found = {(row["method"], row["sparsity"], row["seed"]): row["measured_ms"] for row in times}
    keys = [(row["method"], row["sparsity"], row["seed"]) for row in runs]
    return [{**row, "measured_ms": found[key]} for row, key in zip(runs, keys) if key in found]


def draw(runs: Sequence[Row], path: Path) -> None:
    """Accuracy and distance against measured time: a curve through the means of each target, a dot per student."""
    panels = {"digit": ("digits, %", 100), "speaker": ("6 speakers, %", 100), "cka": ("1 - CKA to the teacher", 1)}
    with drawing(path, (8.4, 3.0)) as figure:
        for axes, (column, (label, scale)) in zip(figure.subplots(1, len(panels)), panels.items()):
            for (method, name), (colour, dashes, marker) in zip(METHODS.items(), STYLES):
                own = [row for row in runs if row["method"] == method]
                groups = [[r for r in own if r["sparsity"] == s] for s in dict.fromkeys(r["sparsity"] for r in own)]
                means = sorted(
                    tuple(np.mean([[float(r["measured_ms"]), scale * float(r[column])] for r in rows], axis=0))
                    for rows in groups
                )
                dots = [(float(r["measured_ms"]), scale * float(r[column])) for r in own]
                axes.plot(*zip(*means), color=colour, ls=dashes, label=f"target of {name}")
                axes.plot(*zip(*dots), color=colour, marker=marker, ls="none", markersize=3, alpha=0.6)
            axes.set_xlabel("milliseconds for 10 s of audio", fontsize=8)
            axes.set_title(label, fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder of run.py")
    args = parser.parse_args(argv)
    if args.out:
        measure(args.out)
    runs = timed(read_runs(HERE / "cost.csv"), read_runs(HERE / "latency.csv"))
    compared = [row for milliseconds in TIMES for row in at_equal(runs, "measured_ms", milliseconds)]
    write_table(HERE / "latency_table.csv", table(compared, next(iter(METHODS))), "milliseconds")
    draw(runs, HERE / "latency.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
