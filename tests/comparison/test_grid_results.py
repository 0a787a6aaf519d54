"""The tables of grids match the committed runs."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skill_fairseq.comparison.statistics import crossed_mean, paired_difference

BENCHMARK = Path(__file__).resolve().parents[2] / "examples" / "benchmark"
TASKS = ("digit", "speaker", "speakers_40", "verification", "drinks", "letters")
DISTANCES = ("cka", "l1_normalized")
COSTS = ("parameters", "macs", "milliseconds", "training cpu seconds")
BASELINES = {
    "family": "shared_projection",
    "elastic": "dedicated",
    "constraint": "lagrangian",
    "cost": "by_parameters",
}


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARK / "results" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grids() -> Any:
    return script("grids")


@pytest.fixture(scope="module", params=BASELINES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a grid."""
    return str(request.param)


@pytest.fixture(scope="module")
def runs(name: str) -> list[dict[str, str]]:
    with open(BENCHMARK / "results" / f"{name}.csv", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def lines(name: str) -> list[dict[str, str]]:
    """The committed table."""
    with open(BENCHMARK / "results" / f"{name}_table.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def of(runs: list[dict[str, str]], method: str, sparsity: str) -> list[dict[str, str]]:
    return sorted((r for r in runs if (r["method"], r["sparsity"]) == (method, sparsity)), key=lambda r: r["seed"])


def matrix(rows: list[dict[str, str]], task: str) -> np.ndarray:
    names = [name for name in rows[0] if name.startswith(f"{task}, ") and rows[0][name]] or [task]
    return np.array([[float(row[name]) for name in names] for row in rows])


def test_every_run_is_one_row_that_says_where_it_comes_from(runs: list[dict[str, str]]) -> None:
    keys = [(r["method"], r["sparsity"], r["seed"]) for r in runs]
    assert len(set(keys)) == len(keys)
    for row in runs:
        if row["method"] != "teacher":
            assert re.fullmatch("[0-9a-f]{40}", row["commit"]) and row["cpu"] and int(row["seed"]) > 0
            assert float(row["actual sparsity"]) == pytest.approx(float(row["sparsity"]), abs=0.001)


def given(line: dict[str, str], *names: str) -> list[float]:
    return [float(line[name]) for name in names if line[name]]


def test_the_table_is_the_runs(runs: list[dict[str, str]], lines: list[dict[str, str]]) -> None:
    cells = {(line["method"], line["sparsity"], line["measure"]): line for line in lines}
    assert len(cells) == len(lines)
    for method, sparsity in {(row["method"], row["sparsity"]) for row in runs}:
        rows = of(runs, method, sparsity)
        measured = {m for m in (*TASKS, *DISTANCES, *COSTS) if all(row.get(m) for row in rows)}
        assert {m for who, size, m in cells if (who, size) == (method, sparsity)} == measured
        for measure in measured:
            line = cells[method, sparsity, measure]
            values = matrix(rows, measure) if measure in DISTANCES else [float(row[measure]) for row in rows]
            assert float(line["mean"]) == pytest.approx(float(np.mean(values)), abs=1e-6)
            assert int(line["seeds"]) == len(rows)
            if measure not in COSTS:
                values = matrix(rows, measure)
                interval = crossed_mean(values, [str(i) for i in range(values.shape[1])])
                most = 1 if measure in TASKS else np.inf
                bounds = [] if interval.low is None else [max(0, interval.low), min(most, interval.high or 1)]
                assert given(line, "low", "high") == pytest.approx(bounds, abs=1e-6)


def test_differences_are_paired(name: str, runs: list[dict[str, str]], lines: list[dict[str, str]]) -> None:
    told = 0
    for line in lines:
        if line["measure"] in COSTS or line["method"] in ("teacher", BASELINES[name]):
            assert not line["difference"]
            continue
        rows, baseline = (of(runs, who, line["sparsity"]) for who in (line["method"], BASELINES[name]))
        seeds = {r["seed"] for r in rows} & {r["seed"] for r in baseline}
        sides = [[r for r in side if r["seed"] in seeds] for side in (rows, baseline)]
        if not seeds:
            assert not line["difference"]
            continue
        values = [matrix(side, line["measure"]) for side in sides]
        wanted = [n for n in paired_difference(*values, [str(i) for i in range(values[0].shape[1])]) if n is not None]
        found = given(line, "difference", "difference low", "difference high")
        assert found == pytest.approx(wanted, abs=1e-6)
        told += 1
    assert told > 5


def test_students_are_compared_at_equal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up case, and the committed table from the committed runs and times."""
    monkeypatch.syspath_prepend(str(BENCHMARK / "results"))
    latency = script("latency")
    known = [(50, 0.9), (30, 0.7), (20, 0.3)]
    runs = [
        {"method": "by_time", "seed": "1", "sparsity": str(i), "measured_ms": str(ms), "digit": str(rate), "cpu": "a"}
        for i, (ms, rate) in enumerate(known)
    ]
    runs += [{**row, "seed": "2", "measured_ms": str(float(row["measured_ms"]) + 15)} for row in runs]
    (first,) = latency.at_equal(runs, "measured_ms", 27)  # those of the second seed are all slower
    assert (first["method"], first["seed"], first["sparsity"]) == ("by_time", "1", "27")
    assert float(first["digit"]) == pytest.approx(0.3 + 0.7 * 0.4) and "cpu" not in first

    results = BENCHMARK / "results"
    times = latency.read_runs(results / "latency.csv")
    runs = latency.timed(latency.read_runs(results / "cost.csv"), times)
    assert len(runs) == len(times) and {row["method"] for row in runs} == set(latency.METHODS)
    same_as_committed("latency_table", "milliseconds", latency, runs, "measured_ms", latency.TIMES)


def test_systems_are_compared_at_equal_macs(grids: Any) -> None:
    runs = grids.read_runs(BENCHMARK / "results" / "family.csv")
    same_as_committed("family_equal_macs", "MACs", grids, runs, "macs", grids.MACS["family"])


def same_as_committed(name: str, size: str, module: Any, runs: Any, column: str, values: Any) -> None:
    baseline = BASELINES["cost" if column == "measured_ms" else "family"]
    lines = [line for value in values for line in module.table(module.at_equal(runs, column, value), baseline)]
    with open(BENCHMARK / "results" / f"{name}.csv", encoding="utf-8", newline="") as stream:
        committed = list(csv.DictReader(stream))
    found = [(row[size], row["method"], row["measure"]) for row in committed]
    assert found == [(line.sparsity, line.method, line.measure) for line in lines]
    assert [float(row["mean"]) for row in committed] == pytest.approx([line.mean for line in lines], abs=1e-6)


def test_labels_that_students_learn_from_are_of_no_test_recording() -> None:
    """The protocol's statements on the labels of OS-KDFT and the multi-task student."""
    page = " ".join((BENCHMARK / "protocol.md").read_text(encoding="utf-8").split())

    def read(path: Path) -> list[dict[str, str]]:
        with open(path, encoding="utf-8") as stream:
            return list(csv.DictReader(stream, delimiter="\t"))

    tiny = BENCHMARK.parent / "tiny" / "data"
    learnt = read(tiny / "train.labels.tsv")
    names, speakers = ({row[column] for row in learnt} for column in ("utterance", "speaker"))
    digits = {row["utterance"] for row in learnt if row["label"]}
    assert f"({len(speakers)} speakers in {len(learnt)} recordings; " in page
    assert f" {len(digits)} recordings, those" in page
    assert digits == {row["utterance"] for row in read(tiny / "tasks" / "digit" / "train.labels.tsv")}
    shared = {}
    for task in (tiny / "tasks" / "digit", tiny / "tasks" / "speaker", *sorted((BENCHMARK / "tasks").iterdir())):
        (file,) = [f for f in (task / "test.labels.tsv", task / "test.speakers.tsv") if f.is_file()]
        tested = read(file)
        assert tested and not names & {row["utterance"] for row in tested}, task
        shared[task.name] = len(speakers & {row["speaker"] for row in tested})
    assert shared.pop("speaker") == 4 and set(shared.values()) == {0}


def test_the_picture_is_drawn_of_them(grids: Any, name: str, runs: list[dict[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grids.draw(grids.table(runs, BASELINES[name]), tmp_path / "new.png")
    assert (tmp_path / "new.png").read_bytes()[:4] == b"\x89PNG"
    assert (BENCHMARK / "results" / f"{name}.png").is_file()


def test_new_runs_are_added_and_the_others_stay(grids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "family.csv"
    path.write_bytes((BENCHMARK / "results" / "family.csv").read_bytes())
    before = grids.read_runs(path)
    changed = next(row for row in before if row["method"] == "os_kdft" and row["seed"] == "2")

    def write(file: Path, results: Any) -> None:
        with open(file, "w", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(changed))
            writer.writeheader()
            writer.writerows([{**changed, "digit": "0.5"}, {**changed, "seed": "9"}])
        assert grids.read_runs(path) == before  # nothing is lost if it stops here

    monkeypatch.setattr(grids, "write_runs", write)
    grids.add_runs(path, [])
    after = {(row["method"], row["sparsity"], row["seed"]): row for row in grids.read_runs(path)}
    assert len(after) == len(before) + 1 and after["os_kdft", changed["sparsity"], "9"]["digit"] == changed["digit"]
    assert after["os_kdft", changed["sparsity"], "2"]["digit"] == "0.5"
    assert all(after[r["method"], r["sparsity"], r["seed"]] == r for r in before if r is not changed)
