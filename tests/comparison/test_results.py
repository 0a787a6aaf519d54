"""The benchmark's tables of methods and choices match the committed runs."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from skill_fairseq.comparison.statistics import paired_difference

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "examples" / "benchmark" / "results"
METHODS = {"dphubert", "shared_projection", "skill", "random_groups", "last_layer", "no_distillation"}
MEASURES = ("digit", "speaker", "verification", "l1_normalized")


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def script(name: str) -> Any:
    """One of the scripts beside the results."""
    spec = importlib.util.spec_from_file_location(f"results_{name}", RESULTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs() -> list[dict[str, str]]:
    return rows_of(RESULTS / "reduced.csv")


def table() -> dict[tuple[str, str], dict[str, str]]:
    """The committed table: (method, measure) -> its line."""
    return {(row["method"], row["measure"]): row for row in rows_of(RESULTS / "reduced_table.csv")}


def values(runs: list[dict[str, str]], method: str, column: str) -> np.ndarray:
    """(seeds,) means over sparsities."""
    seeds = sorted({run["seed"] for run in runs if run["method"] == method})
    mine = ([float(run[column]) for run in runs if (run["method"], run["seed"]) == (method, seed)] for seed in seeds)
    return np.array([np.mean(found) for found in mine])


def test_means_are_those_of_the_runs(runs: list[dict[str, str]]) -> None:
    assert len(runs) == 48 and {run["sparsity"] for run in runs} == {"0.5", "0.75", "0.875"}
    assert len({run["commit"] for run in runs}) == 1
    lines = table()
    assert set(lines) == {(method, measure) for method in METHODS for measure in MEASURES}
    for (method, measure), line in lines.items():
        found = values(runs, method, measure)
        assert float(line["mean"]) == pytest.approx(found.mean(), abs=1e-6)
        assert int(line["seeds"]) == len(found) and line["sparsity"] == "0.5 0.75 0.875"


@pytest.mark.parametrize("measure", ["speaker", "l1_normalized"])
def test_intervals_are_over_seeds_and_speakers(runs: list[dict[str, str]], measure: str) -> None:
    columns = [name for name in runs[0] if name.startswith(f"{measure}, ")]
    if measure == "l1_normalized":  # speakers have different numbers of recordings
        rows = (REPOSITORY / "examples" / "tiny" / "data" / "valid.speakers.tsv").read_text().splitlines()[1:]
        columns = [f"{measure}, {row.split()[-1]}" for row in rows]
    for method in METHODS:
        line = table()[method, measure]
        shown = [line[name] for name in ("difference", "difference low", "difference high")]
        if method == "dphubert":
            assert shown == ["", "", ""]
            continue
        mine, baseline = (np.stack([values(runs, who, name) for name in columns], 1) for who in (method, "dphubert"))
        assert [float(n) for n in shown] == pytest.approx(list(paired_difference(mine, baseline, columns)), abs=1e-6)


def test_the_pages_numbers_are_those_of_the_table() -> None:
    page = " ".join((RESULTS.parent / "README.md").read_text(encoding="utf-8").split())
    lines = table()
    digit, speaker = (100 * float(lines["no_distillation", measure]["mean"]) for measure in ("digit", "speaker"))
    assert f"keeps {digit:.1f} % and {speaker:.1f} %" in page
    lost = [-100 * float(lines["no_distillation", measure]["difference"]) for measure in ("digit", "speaker")]
    assert f"worth {lost[0]:.0f} points of digits and {lost[1]:.0f} of speakers" in page


def test_tables_and_pictures_are_what_the_scripts_make(runs: list[dict[str, str]], tmp_path: Path) -> None:
    reduced = script("reduced")
    reduced.write_table(tmp_path / "table.csv", reduced.table(runs))
    assert (tmp_path / "table.csv").read_text() == (RESULTS / "reduced_table.csv").read_text()
    pytest.importorskip("matplotlib")
    reduced.draw(runs, tmp_path / "reduced.png")
    script("choices").draw(tmp_path / "choices.png")
    for name in ("reduced.png", "choices.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and (RESULTS / name).is_file()


def test_choices_are_those_of_the_grid() -> None:
    rows = rows_of(RESULTS / "choices.csv")
    grid = yaml.safe_load((RESULTS.parent / "grid.yaml").read_text(encoding="utf-8"))
    assert {row["variant"] for row in rows} == set(grid["choices"]["methods"]) - {"skill", "no_distillation"}
    for row in rows:  # those without figures came to the base's groups
        assert (row["l1 difference"] == "") == (row["cka difference"] == "") == (row["variant"] in SAME)


SAME = {"skill_cka", "neighbours_only"}
