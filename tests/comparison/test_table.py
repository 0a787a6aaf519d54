"""Means, differences and tables of made-up results."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from messages import says
from runs_table import write_runs

from skill_fairseq.comparison.layer_distance import KINDS
from skill_fairseq.comparison.statistics import crossed_mean, paired_difference
from skill_fairseq.comparison.summary import summarise
from skill_fairseq.comparison.table import write_tables
from skill_fairseq.probing.intervals import wilson

METHODS = {"skill": 0.9, "dphubert": 0.6, "no_distillation": 0.2}
REFERENCES = {
    "teacher": {
        "probes": {
            "digit": {"metric": "accuracy", "value": 0.8, "interval": wilson(80, 100)},
            "pairs": {"metric": "equal error rate", "value": 0.1, "interval": (0.035, 0.165)},
            "two": {"metric": "accuracy", "value": 0.7, "interval": None},
        },
        "costs": {"parameters": 4321, "macs": 5e9, "cpu_seconds": 0.5},
    },
    "logmel": {
        "probes": {
            "digit": {"metric": "accuracy", "value": 0.5, "interval": wilson(50, 100)},
            "pairs": {"metric": "equal error rate", "value": 0.02, "interval": (0.0, 0.084)},
            "two": {"metric": "accuracy", "value": 0.4, "interval": None},
        }
    },
}
SPEAKERS = [f"s{i // 20}" for i in range(200)]
VALID_SPEAKERS = list("aabbbcccc")
WHY = "2 speakers, an interval needs 3 or more"


def result(method: str, sparsity: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([list(METHODS).index(method), int(1000 * sparsity), seed])
    right = (rng.random(200) < METHODS[method]).astype(int)
    groups: Optional[list] = None if method == "no_distillation" else [[0], [1, 2]] if method == "skill" else [[0], [2]]
    table = rng.random((len(KINDS), 4)).round(4)
    pairs = 0.5 - 0.3 * METHODS[method] + np.array([0.0, 0.02, 0.04, 0.06]) + 0.01 * rng.random(4)
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "groups": groups,
        "made": {
            "sparsity": {"asked": sparsity, "expected": sparsity + 0.001 * seed, "actual": sparsity},
            "seconds": {"stage1": 10.0 * seed, "stage2": 5.0, "measure": 3.0},
            "cpu_seconds": 59.0 + seed,
        },
        "probes": {
            "digit": {
                **{"metric": "accuracy", "samples": "200 recordings", "right": "".join(map(str, right))},
                **{"speakers": SPEAKERS, "value": right.mean(), "interval": (0, 1), "no_interval": None},
            },
            "pairs": {
                **{"metric": "equal error rate", "samples": "9 pairs", "by_speaker": pairs.tolist()},
                **{"speakers": list("wxyz"), "value": pairs.mean(), "interval": (0, 1), "no_interval": None},
            },
            "two": {
                **{"metric": "accuracy", "samples": "4 recordings", "right": "1011", "speakers": list("aabb")},
                **{"value": 0.75, "interval": None, "no_interval": WHY},
            },
        },
        "distances": {
            "layers": dict(zip(KINDS, table.tolist())),
            "recordings": {kind: rng.random(9).tolist() for kind in KINDS},
            "speakers": VALID_SPEAKERS,
        },
        "costs": {"parameters": 1000 + seed, "macs": 2e9, "cpu_seconds": 0.25},
        "versions": {"torch": "1"},
        **{"cpu": "a processor", "commit": "0123abc"},
    }


def results(sparsities: tuple = (0.5, 0.75)) -> list[dict[str, Any]]:
    found = [
        result(method, sparsity, seed)
        for method in METHODS
        for sparsity in sparsities
        for seed in ((1,) if method == "no_distillation" else (1, 2, 3))
    ]
    return list(reversed(found))


def rows(summary: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    return {(row["method"], row["sparsity"]): row for row in summary["rows"]}


def right(method: str, sparsity: float) -> np.ndarray:
    seeds = (1,) if method == "no_distillation" else (1, 2, 3)
    return np.array([[int(c) for c in result(method, sparsity, s)["probes"]["digit"]["right"]] for s in seeds])


def test_accuracies_and_differences_are_those_of_the_outcomes() -> None:
    found = rows(summarise(results(), REFERENCES, "dphubert"))
    row = found["skill", 0.75]
    assert row["probes"]["digit"] == pytest.approx(crossed_mean(right("skill", 0.75), SPEAKERS), abs=1e-6)
    wanted = paired_difference(right("skill", 0.75), right("dphubert", 0.75), SPEAKERS)
    assert row["difference"]["digit"]["estimate"] == pytest.approx(wanted, abs=1e-6)
    assert row["difference"]["digit"]["verdict"] == "higher" and row["seeds"] == [1, 2, 3]
    untrained = found["no_distillation", 0.5]
    wanted = paired_difference(right("no_distillation", 0.5), right("dphubert", 0.5), SPEAKERS)
    assert untrained["difference"]["digit"]["estimate"] == pytest.approx(wanted, abs=1e-6)
    assert untrained["difference"]["digit"]["verdict"] == "lower" and untrained["seeds"] == [1]


def test_error_rates_are_compared_by_speaker() -> None:
    found = rows(summarise(results(), REFERENCES, "dphubert"))
    values = {
        method: np.array([result(method, 0.75, seed)["probes"]["pairs"]["by_speaker"] for seed in (1, 2, 3)])
        for method in ("skill", "dphubert")
    }
    row = found["skill", 0.75]
    assert row["probes"]["pairs"] == pytest.approx(crossed_mean(values["skill"], list("wxyz")), abs=1e-6)
    wanted = paired_difference(values["skill"], values["dphubert"], list("wxyz"))
    assert row["difference"]["pairs"]["estimate"] == pytest.approx(wanted, abs=1e-6)


def test_intervals_of_rates_end_at_0_and_1() -> None:
    few = [r for r in results((0.5,)) if r["method"] == "skill"]
    for r in few:
        r["probes"]["pairs"]["by_speaker"] = [0.0, 0.0, 0.0, 0.08]
    assert (crossed_mean(np.array([[0.0, 0.0, 0.0, 0.08]] * 3), list("wxyz")).low or 0) < 0
    row = rows(summarise(few, REFERENCES, "dphubert"))["skill", 0.5]
    assert row["probes"]["pairs"][:2] == [0.02, 0.0]


def test_over_all_sparsities_each_recording_counts_its_mean() -> None:
    row = rows(summarise(results(), REFERENCES, "dphubert"))["skill", "all"]
    mean = {m: (right(m, 0.5) + right(m, 0.75)) / 2 for m in ("skill", "dphubert")}
    assert row["probes"]["digit"] == pytest.approx(crossed_mean(mean["skill"], SPEAKERS), abs=1e-6)
    wanted = paired_difference(mean["skill"], mean["dphubert"], SPEAKERS)
    assert row["difference"]["digit"]["estimate"] == pytest.approx(wanted, abs=1e-6)


def test_distances_of_distilled_layers_and_of_others() -> None:
    found = rows(summarise(results(), REFERENCES, "dphubert"))
    layers = [np.array(result("dphubert", 0.5, s)["distances"]["layers"]["cos"]) for s in (1, 2, 3)]
    row = found["dphubert", 0.5]
    assert row["layers"]["cos"] == pytest.approx(np.mean(layers, axis=0), abs=1e-6)
    assert row["distilled"]["cos"] == pytest.approx(np.mean([v[[0, 2]] for v in layers]))
    assert row["not_distilled"]["cos"] == pytest.approx(np.mean([v[[1, 3]] for v in layers]))
    assert found["no_distillation", 0.5]["distilled"]["cos"] is None


def test_only_seeds_that_both_have_are_paired() -> None:
    some = [r for r in results((0.5,)) if (r["method"], r["seed"]) != ("dphubert", 2)]
    row = rows(summarise(some, REFERENCES, "dphubert"))["skill", 0.5]
    wanted = paired_difference(right("skill", 0.5)[[0, 2]], right("dphubert", 0.5)[[0, 2]], SPEAKERS)
    assert row["difference"]["digit"]["estimate"] == pytest.approx(wanted, abs=1e-6) and row["seeds"] == [1, 2, 3]


def test_without_the_baseline_there_is_no_difference_to_report() -> None:
    some = [r for r in results((0.5,)) if r["method"] != "dphubert"]
    summary = summarise(some, REFERENCES, "dphubert")
    assert rows(summary)["skill", 0.5]["difference"] == {}
    assert "nothing to compare yet" in write_tables(summary)


def test_a_method_that_lacks_a_sparsity_has_no_overall_row() -> None:
    some = [r for r in results() if (r["method"], r["sparsity"]) != ("skill", 0.5)]
    assert ("skill", "all") not in rows(summarise(some, REFERENCES, "dphubert"))


def test_distances_go_by_the_speakers_of_the_valid_recordings() -> None:
    row = rows(summarise(results(), REFERENCES, "dphubert"))["skill", 0.75]
    far = {
        m: np.array([result(m, 0.75, seed)["distances"]["recordings"]["cka"] for seed in (1, 2, 3)])
        for m in ("skill", "dphubert")
    }
    assert row["distance"]["cka"] == pytest.approx(crossed_mean(far["skill"], VALID_SPEAKERS), abs=1e-6)
    wanted = paired_difference(far["skill"], far["dphubert"], VALID_SPEAKERS)
    assert row["distance_difference"]["cka"]["estimate"] == pytest.approx(wanted, abs=1e-6)


def test_where_speakers_are_few_or_unknown_there_are_values_and_it_is_said_why_no_intervals() -> None:
    unknown = [{**r, "distances": {**r["distances"], "speakers": None}} for r in results((0.5,))]
    summary = summarise(unknown, REFERENCES, "dphubert")
    row = rows(summary)["skill", 0.5]
    assert row["probes"]["two"] == [0.75, None, None] and row["distance"]["cka"][1:] == [None, None]
    assert row["difference"]["two"] == {"estimate": [0.0, None, None], "verdict": "no interval", "within": None}
    text = write_tables({**summary, "found": 7, "wanted": 7})
    assert re.search(says(f"two ({WHY})", "distances to the teacher", "speakers unknown"), text.split("\n\n")[0])
    assert "| 75.0 (no interval) | +0.0 (no interval) |" in text


def test_no_evidence_of_a_difference_is_never_called_no_difference() -> None:
    """A method with the baseline's rate is shown with the bound that its interval allows."""
    same = [r for r in results((0.5,)) if r["method"] == "dphubert"]
    twin = [{**r, "method": "skill", "probes": result("dphubert", 0.501, r["seed"])["probes"]} for r in same]
    summary = summarise([*same, *twin], REFERENCES, "dphubert")
    difference = rows(summary)["skill", 0.5]["difference"]["digit"]
    _, low, high = difference["estimate"]
    assert low < 0 < high and difference["verdict"] == "not distinguishable"
    assert difference["within"] == max(-low, high)
    text = write_tables({**summary, "found": 6, "wanted": 6})
    assert f"not distinguishable within \u00b1{100 * difference['within']:.1f} |" in text
    assert f"points: not distinguishable within \u00b1{100 * difference['within']:.1f} points;" in text
    assert "no difference" not in text


def test_tables_show_the_numbers() -> None:
    summary = summarise(results(), REFERENCES, "dphubert")
    text = write_tables({**summary, "found": 14, "wanted": 20})
    accuracy = rows(summary)["skill", 0.75]["probes"]["digit"]
    difference = rows(summary)["skill", 0.75]["difference"]["digit"]["estimate"]
    row = rows(summary)["skill", 0.75]
    both = (*accuracy, *difference, *row["probes"]["pairs"], *row["difference"]["pairs"]["estimate"])
    shown = (
        "{:.1f} [{:.1f}, {:.1f}] | {:+.1f} [{:+.1f}, {:+.1f}] higher | "
        "{:.1f} [{:.1f}, {:.1f}] | {:+.1f} [{:+.1f}, {:+.1f}] lower | "
        "75.0 (no interval) | +0.0 (no interval) | {{0}} {{1,2}} |"
    ).format(*(100 * number for number in both))
    assert "| method | seeds | digit % | less dphubert, points | pairs error % | less dphubert, points | two %" in text
    assert f"| skill | 3 | {shown}" in text
    assert re.search(
        says("14 of 20", "digit", "accuracy", "200 recordings", "pairs", "equal error rate"), text.split("\n\n")[0]
    )
    assert "| teacher | 80.0 [71.1, 86.7] | 10.0 [3.5, 16.5] | 70.0 (no interval) | 4,321 | 5.000 | 0.500 |" in text
    assert "| teacher | 4,321 | 5.000 | 0.500 | - | - | - | - | - | - |" in text
    assert "| logmel | 50.0 [40.4, 59.6] | 2.0 [0.0, 8.4] | 40.0 (no interval) | - | - | - |" in text
    assert "| skill | 1,002 | 2.000 | 0.250 | 0.7500 | 0.7510 to 0.7530 | 61 | 20 | 5 | 3 |" in text
    assert re.search(r"\*\*skill\*\*.*dphubert.*3 seeds.*digit \+", text)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 9  # undistilled models; probes, distance, costs of two sparsities; two of the means
    for head, *lines in tables:  # otherwise Markdown drops cells
        assert [line.count("|") for line in lines] == [head.count("|")] * len(lines)


def test_groups_that_change_with_the_seed_and_shared_runs_are_told() -> None:
    changed = [
        {**r, "groups": [[0], [r["seed"]]], "made_by": "dphubert"} if r["method"] == "skill" else r
        for r in results((0.5,))
    ]
    assert "(no interval) | by seed |\n" in write_tables(summarise(changed, REFERENCES, "dphubert"))
    shared = [{**r, "made_by": "dphubert"} if r["method"] == "skill" else r for r in results((0.5,))]
    assert "(no interval) | {0} {1,2} (runs of dphubert) |\n" in write_tables(summarise(shared, REFERENCES, "dphubert"))


def test_the_table_of_runs_holds_what_every_interval_is_made_of(tmp_path: Path) -> None:
    made = [r for r in results((0.75,)) if r["method"] != "no_distillation"]
    write_runs(tmp_path / "runs.csv", made)
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(row["method"], row["seed"]) for row in table] == [(r["method"], str(r["seed"])) for r in made]
    assert table[0]["commit"] == "0123abc" and table[0]["cpu"] == "a processor"
    assert {row["groups"] for row in table} == {"{0} {1,2}", "{0} {2}"}
    row = rows(summarise(made, REFERENCES, "dphubert"))["skill", 0.75]
    for task, speakers in (("digit", sorted(set(SPEAKERS))), ("pairs", list("wxyz"))):  # equally many samples each
        sides = [
            np.array(
                [
                    [float(r[f"{task}, {s}"]) for s in speakers]
                    for r in sorted(table, key=lambda r: r["seed"])
                    if r["method"] == m
                ]
            )
            for m in ("skill", "dphubert")
        ]
        wanted = row["difference"][task]["estimate"]
        assert paired_difference(*sides, speakers) == pytest.approx(wanted, abs=2e-6)


def test_students_of_another_width_are_compared_by_cka_alone() -> None:
    """A related system has no groups, but is trained, so its seeds are paired with the baseline's."""
    found = []
    for r in results((0.75,)):
        if r["method"] == "skill":
            far = {name: {"cka": r["distances"][name]["cka"]} for name in ("layers", "recordings")}
            r = {**r, "groups": None, "recipe": "distill/tiny_x", "distances": {**r["distances"], **far}}
        found.append(r)
    summary = summarise(found, REFERENCES, "dphubert")
    row = rows(summary)["skill", 0.75]
    assert set(row["distance"]) == set(row["distance_difference"]) == set(row["layers"]) == {"cka"}
    assert row["difference"] == rows(summarise(results((0.75,)), REFERENCES, "dphubert"))["skill", 0.75]["difference"]
    assert row["distilled"] == {} and set(rows(summary)["no_distillation", 0.75]["distance"]) == set(KINDS)
    text = write_tables({**summary, "found": 7, "wanted": 7})
    line = next(line for line in text.splitlines() if line.startswith("| skill | - | - | - | - |"))
    assert "{:.3f} [".format(row["distance"]["cka"][0]) in line and "| distill/tiny_x |" in text
    said = next(line for line in text.splitlines() if line.startswith("- **skill**"))
    assert "CKA to the teacher" in said and "L1" not in said


def test_the_baseline_may_be_of_another_width() -> None:
    found = []
    for r in results((0.75,)):
        if r["method"] == "dphubert":
            far = {name: {"cka": r["distances"][name]["cka"]} for name in ("layers", "recordings")}
            r = {**r, "groups": None, "recipe": "distill/tiny_x", "distances": {**r["distances"], **far}}
        found.append(r)
    row = rows(summarise(found, REFERENCES, "dphubert"))["skill", 0.75]
    assert set(row["distance"]) == set(KINDS) and set(row["distance_difference"]) == {"cka"}


def test_single_runs_of_another_width_have_no_column_for_what_they_lack(tmp_path: Path) -> None:
    made = result("skill", 0.5, 1)
    far = {name: {"cka": made["distances"][name]["cka"]} for name in ("layers", "recordings")}
    other = {**made, "groups": None, "recipe": "distill/tiny_x", "distances": {**made["distances"], **far}}
    write_runs(tmp_path / "runs.csv", [made, {**other, "method": "x"}])
    first, second = csv.DictReader((tmp_path / "runs.csv").open())
    assert first["cos"] and not second["cos"] and second["cka"] == first["cka"]
    assert second["groups"] == "distill/tiny_x" and second["budget"] == "parameters"
    assert (first["macs"], first["milliseconds"], first["training cpu seconds"]) == ("2000000000", "250", "60")
