"""The table of times to a student: reading a run, and adding rows."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("leaderboard", REPO / "examples" / "tiny" / "leaderboard.py")
assert spec is not None and spec.loader is not None
leaderboard = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leaderboard)

SAID = """
== stage 1: distil and prune
  num_updates 400
(97 s)
install                                   112 s
cluster the teacher's layers               14 s
stage 1: distil and prune                  97 s
shrink                                      2 s
stage 2: distil the shrunk student         30 s
export                                      3 s
probe                                      20 s
all together                              278 s
"""


def test_steps_are_those_of_the_script() -> None:
    script = (REPO / "examples" / "tiny" / "run.sh").read_text(encoding="utf-8")
    assert all(f'step "{name}"' in script for name in leaderboard.STEPS.values())


def test_rows_are_added_below_one_head(tmp_path: Path) -> None:
    results = [
        {"model": model, "task": task, "correct": correct, "total": 300, "parameters": 252458}
        for model, task, correct in (("teacher", "digit", 1), ("student", "digit", 251), ("student", "speaker", 270))
    ]
    (tmp_path / "probe.json").write_text(json.dumps({"results": results}))
    for note in ("first", "second, with a comma"):
        leaderboard.append(tmp_path / "t.csv", leaderboard.row(REPO, tmp_path, SAID, note))
    with open(tmp_path / "t.csv", encoding="utf-8") as stream:
        first, second = csv.DictReader(stream)
    assert int(first["seconds"]) == 14 + 97 + 2 + 30 + 3 and first["stage 1"] == "97"
    assert (first["digits"], first["speakers"], first["parameters"]) == ("0.8367", "0.9000", "252458")
    assert len(first["commit"].rstrip("+")) == 40 and second["note"] == "second, with a comma"


def test_a_step_that_is_missing() -> None:
    with pytest.raises(ValueError, match="stage 2"):
        leaderboard.seconds_of(SAID.replace("stage 2", "stage two"))


def test_the_committed_rows_have_one_form() -> None:
    path = REPO / "examples" / "tiny" / "leaderboard.csv"
    with open(path, encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert rows
    for row in rows:
        steps = [int(row[column]) for column in leaderboard.STEPS]
        assert int(row["seconds"]) == sum(steps) and len(row["commit"]) == 40 and row["cpu"]
