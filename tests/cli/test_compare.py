"""skill-compare: files of skill-probe, one a seed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import says

from skill_fairseq.cli.compare import main
from skill_fairseq.comparison.statistics import crossed_mean, paired_difference

SPEAKERS = [f"s{i // 20}" for i in range(100)]
RATES = {"plain": 0.6, "mine": 0.8, "same": 0.6}


def outcomes(model: str, seed: int) -> np.ndarray:
    """(100,) 0 or 1; "same" is "plain" with other mistakes."""
    return (np.random.default_rng([seed, len(model), ord(model[0])]).random(100) < RATES[model]).astype(int)


def entries(seed: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for model in RATES:
        right = outcomes(model, seed)
        rate = {"model": model, "task": "digit", "metric": "accuracy", "value": float(right.mean())}
        found.append({**rate, "right": "".join(map(str, right)), "speakers": SPEAKERS})
        errors = (1 - right).reshape(5, 20).mean(1).tolist()
        rate = {"model": model, "task": "pairs", "metric": "equal error rate", "value": float(1 - right.mean())}
        found.append({**rate, "by_speaker": errors, "speakers": [f"s{i}" for i in range(5)]})
    return found


def write(folder: Path, **changes: Any) -> list[str]:
    for seed in (1, 2, 3):
        (folder / f"{seed}.json").write_text(json.dumps({"results": entries(seed), **(changes if seed == 2 else {})}))
    return [str(folder / f"{seed}.json") for seed in (1, 2, 3)]


def test_means_and_paired_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path)
    assert main([*files, "--baseline", "plain", "--json"]) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["seeds"] == files and len(said["results"]) == 6
    rows = {(row["model"], row["task"]): row for row in said["results"]}
    values = {model: np.array([outcomes(model, seed) for seed in (1, 2, 3)]) for model in RATES}
    for model in RATES:
        row = rows[model, "digit"]
        assert row["seeds"] == 3 and row["estimate"] == pytest.approx(crossed_mean(values[model], SPEAKERS), abs=1e-6)
        if model != "plain":
            less = paired_difference(values[model], values["plain"], SPEAKERS)
            assert row["difference"]["estimate"] == pytest.approx(less, abs=1e-6)
    assert rows["plain", "digit"]["difference"] is None
    assert rows["mine", "digit"]["difference"]["verdict"] == "higher"
    assert rows["mine", "pairs"]["difference"]["verdict"] == "lower"
    assert rows["same", "digit"]["difference"]["verdict"] == "not distinguishable"
    assert rows["mine", "pairs"]["estimate"][0] == pytest.approx(1 - rows["mine", "digit"]["estimate"][0])
    (line,) = [line for line in printed.err.splitlines() if re.match("mine +digit", line)]
    value, low, high = (100 * number for number in rows["mine", "digit"]["estimate"])
    assert f"accuracy {value:.1f} [{low:.1f}, {high:.1f}]" in line and line.endswith("] higher")


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({}, ["--baseline", "none"], ["--baseline", "'none'", "plain, mine, same"]),
        ({}, [], ["--baseline"]),
        ({"results": entries(2)[:-1]}, ["--baseline", "plain"], ["2.json", "other models or tasks"]),
        (
            {"results": [{**e, "speakers": [*e["speakers"][:-1], "x"]} for e in entries(2)]},
            ["--baseline", "plain"],
            ["2.json", "plain", "'digit'", "other recordings"],
        ),
        ({"results": [*entries(2), entries(2)[0]]}, ["--baseline", "plain"], ["2.json", "'plain'", "'digit'", "twice"]),
        ({"results": [{"model": "a"}]}, ["--baseline", "plain"], ["2.json", "results[0]", "'task'"]),
        ({"results": 3}, ["--baseline", "plain"], ["2.json", "results", "3"]),
    ],
)
def test_what_does_not_fit_together(
    changes: dict[str, Any], words: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path, **changes)
    assert main([*files, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(says(*said), error) and error.count("\n") == 1


def test_inputs_are_not_taken_for_the_file_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path)
    before = [Path(file).read_text() for file in files]
    assert main(["--baseline", "plain", "--json", *files]) == 0
    assert json.loads(capsys.readouterr().out) and [Path(file).read_text() for file in files] == before
    assert main([*files, "--baseline", "plain", f"--json={tmp_path / 'out.json'}"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"]


def test_a_baseline_without_a_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path)
    for file in files:
        given = json.loads(Path(file).read_text())
        given["results"] = [e for e in given["results"] if (e["model"], e["task"]) != ("plain", "pairs")]
        Path(file).write_text(json.dumps(given))
    assert main([*files, "--baseline", "plain"]) == 2
    assert re.search(says("'plain'", "'pairs'"), capsys.readouterr().err)


def test_a_file_is_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path)
    assert main([files[0], files[0], "--baseline", "plain"]) == 2
    assert re.search(says("FILE", files[0], "2 times"), capsys.readouterr().err)
