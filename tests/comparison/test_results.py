"""The page's table of methods matches the committed runs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from skill_fairseq.comparison.statistics import paired_difference

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = {
    "single layers 0, 4, 8, 12": "dphubert",
    "groups of similar layers": "shared_projection",
    "the same groups, a projection each": "skill",
    "random groups": "random_groups",
    "the last layer": "last_layer",
    "nothing: pruned at once": "no_distillation",
}
MEASURES = {"digit": (100, 1), "speaker": (100, 1), "verification": (100, 1), "l1_normalized": (1, 3)}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, str]]:
    with open(REPOSITORY / "examples" / "benchmark" / "results" / "reduced.csv") as file:
        return list(csv.DictReader(file))


def table() -> dict[str, list[str]]:
    """The page's cells after the first, by method."""
    page = (REPOSITORY / "examples" / "benchmark" / "README.md").read_text()
    section = page.split("## Do groups beat single layers?")[1].split("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    return {next(method for words, method in METHODS.items() if name.startswith(words)): cells for name, *cells in rows}


def values(runs: list[dict[str, str]], method: str, column: str) -> np.ndarray:
    """(seeds,) means over sparsities."""
    seeds = sorted({run["seed"] for run in runs if run["method"] == method})
    mine = ([float(run[column]) for run in runs if (run["method"], run["seed"]) == (method, seed)] for seed in seeds)
    return np.array([np.mean(found) for found in mine])


def test_means_are_those_of_the_runs(runs: list[dict[str, str]]) -> None:
    assert len(runs) == 48 and {run["sparsity"] for run in runs} == {"0.5", "0.75", "0.875"}
    assert len({run["commit"] for run in runs}) == 1
    rows = table()
    assert set(rows) == set(METHODS.values())
    for method, cells in rows.items():
        digit, speaker, _, verification, _, distance, _ = cells
        for cell, (column, (scale, digits)) in zip((digit, speaker, verification, distance), MEASURES.items()):
            assert cell == f"{scale * values(runs, method, column).mean():.{digits}f}", (method, column)


@pytest.mark.parametrize(("cell", "column"), [(2, "speaker"), (6, "l1_normalized")])
def test_intervals_are_over_seeds_and_speakers(runs: list[dict[str, str]], cell: int, column: str) -> None:
    columns = [name for name in runs[0] if name.startswith(f"{column}, ")]
    if column == "l1_normalized":  # speakers have different numbers of recordings
        rows = (REPOSITORY / "examples" / "tiny" / "data" / "valid.speakers.tsv").read_text().splitlines()[1:]
        columns = [f"{column}, {row.split()[-1]}" for row in rows]
    scale, digits = MEASURES[column]
    for method, cells in table().items():
        if method == "dphubert":
            assert cells[cell] == "-"
            continue
        mine, baseline = (np.stack([values(runs, who, name) for name in columns], 1) for who in (method, "dphubert"))
        shown = [float(number) for number in re.findall(r"[-+]\d+\.\d+", cells[cell])]
        found = [scale * number for number in paired_difference(mine, baseline, columns)]
        # The runs hold six digits, but the table was made from more, so rounding may differ.
        assert shown == pytest.approx(found, abs=0.51 * 10**-digits), method
