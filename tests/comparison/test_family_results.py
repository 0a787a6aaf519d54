"""The page's table of related systems matches the committed runs."""

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
TASKS = {"digits": "digit", "6 speakers": "speaker", "40 speakers": "speakers_40", "verification error": "verification"}
TASKS.update({"drinks": "drinks", "letter error": "letters"})


@pytest.fixture(scope="module")
def family() -> Any:
    spec = importlib.util.spec_from_file_location("family", BENCHMARK / "results" / "family.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs() -> list[dict[str, str]]:
    with open(BENCHMARK / "results" / "family.csv", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def page() -> str:
    return (BENCHMARK / "README.md").read_text(encoding="utf-8")


def tables(page: str) -> dict[tuple[str, bool], tuple[list[str], list[list[str]]]]:
    """(sparsity, of differences) -> head and lines."""
    part = page.split("<!-- results/family.py -->")[1].split("<!-- end -->")[0]
    found = {}
    for title, table in re.findall(r"(?m)^(Sparsity .*):\n\n((?:\|.*\n?)+)", part):
        head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
        found[title.split()[1].rstrip(","), "less" in title] = (head, lines)
    return found


def of(runs: list[dict[str, str]], method: str, sparsity: str) -> list[dict[str, str]]:
    return sorted((r for r in runs if (r["method"], r["sparsity"]) == (method, sparsity)), key=lambda r: r["seed"])


def matrix(rows: list[dict[str, str]], task: str) -> np.ndarray:
    names = [name for name in rows[0] if name.startswith(f"{task}, ") and rows[0][name]] or [task]
    return np.array([[float(row[name]) for name in names] for row in rows])


def numbers(cell: str) -> list[float]:
    return [float(n) for n in re.findall(r"[-+]?\d+\.\d+", cell)]


def test_every_run_is_one_row_that_says_where_it_comes_from(runs: list[dict[str, str]]) -> None:
    keys = [(r["method"], r["sparsity"], r["seed"]) for r in runs]
    assert len(set(keys)) == len(keys)
    for row in runs:
        if row["method"] != "teacher":
            assert re.fullmatch("[0-9a-f]{40}", row["commit"]) and row["cpu"] and int(row["seed"]) > 0
            assert float(row["actual sparsity"]) == pytest.approx(float(row["sparsity"]), abs=0.001)


def test_the_table_is_the_runs(runs: list[dict[str, str]], page: str) -> None:
    found = tables(page)
    students = [row for row in runs if row["method"] != "teacher"]
    assert {s for s, less in found if not less} == {row["sparsity"] for row in students}
    for sparsity in {row["sparsity"] for row in students}:
        head, lines = found[sparsity, False]
        wanted = {row["method"] for row in students if row["sparsity"] == sparsity}
        assert {line[0] for line in lines} == {"teacher", *wanted}
        for line in lines:
            rows = of(runs, line[0], "0" if line[0] == "teacher" else sparsity)
            for name, cell in zip(head, line):
                task = TASKS.get(name.removesuffix(" %"))
                if task and rows[0].get(task):
                    value, *ends = numbers(cell)
                    assert value == pytest.approx(100 * np.mean([float(r[task]) for r in rows]), abs=0.051)
                    values = matrix(rows, task)
                    interval = crossed_mean(values, [str(i) for i in range(values.shape[1])])
                    bounds = [] if interval.low is None else [max(0, interval.low), min(1, interval.high or 1)]
                    assert ends == pytest.approx([100 * bound for bound in bounds], abs=0.051)
            assert line[head.index("parameters")] == f"{np.mean([float(r['parameters']) for r in rows]):,.0f}"
            assert line[1] == ("-" if line[0] == "teacher" else str(len(rows)))


def test_differences_are_paired(runs: list[dict[str, str]], page: str) -> None:
    for (sparsity, less), (head, lines) in tables(page).items():
        for method, *cells in lines if less else ():
            rows, baseline = of(runs, method, sparsity), of(runs, "shared_projection", sparsity)
            seeds = {r["seed"] for r in rows} & {r["seed"] for r in baseline}
            sides = [[r for r in side if r["seed"] in seeds] for side in (rows, baseline)]
            for name, cell in zip(head[1:], cells):
                task = TASKS[name.removesuffix(", points")]
                values = [matrix(side, task) for side in sides]
                wanted = paired_difference(*values, [str(i) for i in range(values[0].shape[1])])
                assert numbers(cell) == pytest.approx([100 * n for n in wanted if n is not None], abs=0.051)


def test_labels_that_students_learn_from_are_of_no_test_recording(page: str) -> None:
    """The page's statements on the labels of OS-KDFT and the multi-task student."""

    def read(path: Path) -> list[dict[str, str]]:
        with open(path, encoding="utf-8") as stream:
            return list(csv.DictReader(stream, delimiter="\t"))

    tiny = BENCHMARK.parent / "tiny" / "data"
    learnt = read(tiny / "train.labels.tsv")
    names, speakers = ({row[column] for row in learnt} for column in ("utterance", "speaker"))
    digits = {row["utterance"] for row in learnt if row["label"]}
    assert f"({len(speakers)}\nspeakers in {len(learnt)} recordings; " in page
    assert f"\n{len(digits)} recordings, those" in page
    assert digits == {row["utterance"] for row in read(tiny / "tasks" / "digit" / "train.labels.tsv")}
    shared = {}
    for task in (tiny / "tasks" / "digit", tiny / "tasks" / "speaker", *sorted((BENCHMARK / "tasks").iterdir())):
        (file,) = [f for f in (task / "test.labels.tsv", task / "test.speakers.tsv") if f.is_file()]
        tested = read(file)
        assert tested and not names & {row["utterance"] for row in tested}, task
        shared[task.name] = len(speakers & {row["speaker"] for row in tested})
    assert shared.pop("speaker") == 4 and set(shared.values()) == {0}


def test_the_picture_is_drawn_of_them(family: Any, runs: list[dict[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    family.draw(runs, tmp_path / "family.png")
    assert (tmp_path / "family.png").read_bytes()[:4] == b"\x89PNG"
    assert (BENCHMARK / "results" / "family.png").is_file()


def test_new_runs_are_added_and_the_others_stay(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "family.csv"
    path.write_bytes((BENCHMARK / "results" / "family.csv").read_bytes())
    before = family.read_runs(path)
    changed = next(row for row in before if row["method"] == "os_kdft" and row["seed"] == "2")

    def write(file: Path, results: Any) -> None:
        with open(file, "w", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(changed))
            writer.writeheader()
            writer.writerows([{**changed, "digit": "0.5"}, {**changed, "seed": "9"}])
        assert family.read_runs(path) == before  # nothing is lost if it stops here

    monkeypatch.setattr(family, "write_runs", write)
    family.add_runs(path, [])
    after = {(row["method"], row["sparsity"], row["seed"]): row for row in family.read_runs(path)}
    assert len(after) == len(before) + 1 and after["os_kdft", changed["sparsity"], "9"]["digit"] == changed["digit"]
    assert after["os_kdft", changed["sparsity"], "2"]["digit"] == "0.5"
    assert all(after[r["method"], r["sparsity"], r["seed"]] == r for r in before if r is not changed)
