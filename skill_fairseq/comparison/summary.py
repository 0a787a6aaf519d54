"""Summarises results of single runs: means, intervals and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from skill_fairseq.comparison.layer_distance import KINDS, mean_over
from skill_fairseq.comparison.statistics import Estimate, crossed_mean, paired_difference
from skill_fairseq.probing.evaluate import outcomes
from skill_fairseq.probing.intervals import MIN_SPEAKERS, why_none

Result = Mapping[str, Any]
OVERALL = "all"
"""Stands for the mean over all sparsities."""

NOT_TOLD, NO_INTERVAL = "not distinguishable", "no interval"
PROBE_VERDICTS = {1: "higher", 0: NOT_TOLD, -1: "lower", None: NO_INTERVAL}
DISTANCE_VERDICTS = {1: "farther", 0: NOT_TOLD, -1: "nearer", None: NO_INTERVAL}


def summarise(results: Sequence[Result], references: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """Computes everything that the tables show.

    Args:
        results: one per method, sparsity and seed.
        references: name -> probes and optional costs of models that are not distilled.
        baseline: the method to subtract for differences.

    Returns:
        ``rows``: one per method and sparsity (under "all" the mean over sparsities, if a method was run with the same
        seeds at all of them), for JSON. A row has the kinds of distances that all its results have: students of
        another width than the teacher's have only CKA.
    """
    methods = list(dict.fromkeys(result["method"] for result in results))
    sparsities = sorted({result["sparsity"] for result in results})
    cells = {
        (method, sparsity): sorted(
            (r for r in results if r["method"] == method and r["sparsity"] == sparsity), key=lambda r: r["seed"]
        )
        for method in methods
        for sparsity in sparsities
    }
    tasks = list(results[0]["probes"])
    rows = []
    if len(sparsities) > 1:
        for method in methods:
            own = [cells[method, sparsity] for sparsity in sparsities]
            if len({tuple(r["seed"] for r in cell) for cell in own}) == 1:
                others = [cells.get((baseline, sparsity), []) for sparsity in sparsities]
                rows.append(_row(method, OVERALL, own, others, tasks))
    for sparsity in sparsities:
        rows += [_row(m, sparsity, [cells[m, sparsity]], [cells.get((baseline, sparsity), [])], tasks) for m in methods]
    rows = [row for row in rows if row]
    return {
        "baseline": baseline,
        "tasks": {task: _about([result["probes"][task] for result in results]) for task in tasks},
        "distances": _about_distances(results[0]["distances"]),
        "references": {name: _reference(found) for name, found in references.items()},
        "rows": rows,
        "versions": results[0]["versions"],
    }


def _about(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A task's metric, samples, and the reason why it has no intervals, or None."""
    why = entries[0]["no_interval"] if all(entry["interval"] is None for entry in entries) else None
    return {"metric": entries[0]["metric"], "samples": entries[0]["samples"], "no_interval": why}


def _about_distances(found: Mapping[str, Any]) -> dict[str, Any]:
    number = len(set(found["speakers"] or ()))
    return {"speakers": number, "no_interval": None if number >= MIN_SPEAKERS else why_none(number)}


def _reference(found: Mapping[str, Any]) -> dict[str, Any]:
    probes = {
        task: plain(Estimate(entry["value"], *(entry["interval"] or (None, None))))
        for task, entry in found["probes"].items()
    }
    return {"probes": probes, "costs": found.get("costs")}


def _row(
    method: str, sparsity: Any, cells: list[list[Result]], base_cells: list[list[Result]], tasks: Sequence[str]
) -> dict[str, Any]:
    """One method at one sparsity or over several; each cell holds results by seed."""
    if not all(cells):
        return {}
    seeds = [result["seed"] for result in cells[0]]
    row: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "seeds": seeds,
        "made_by": sorted({r.get("made_by", method) for cell in cells for r in cell}),
        "groups": [result["groups"] for result in cells[0]],
        "recipe": cells[0][0].get("recipe"),
        "probes": {},
        "difference": {},
        "distance": {},
        "distance_difference": {},
    }
    paired = _paired(cells, base_cells)
    for task in tasks:
        speakers = outcomes(cells[0][0]["probes"][task])[1]
        row["probes"][task] = plain(within_bounds(crossed_mean(_outcomes(cells, task), speakers)))
        if paired:
            values, baseline = (_outcomes(side, task) for side in paired)
            row["difference"][task] = judged(paired_difference(values, baseline, speakers), PROBE_VERDICTS)
    for kind in _kinds(cells):
        far, said = _far(cells, kind), cells[0][0]["distances"]["speakers"]
        speakers = said or ["unknown"] * far.shape[1]
        row["distance"][kind] = plain(crossed_mean(far, speakers))
        if paired and kind in _kinds(base_cells):
            values, baseline = (_far(side, kind) for side in paired)
            row["distance_difference"][kind] = judged(paired_difference(values, baseline, speakers), DISTANCE_VERDICTS)
    row["layers"] = {
        kind: np.mean([r["distances"]["layers"][kind] for cell in cells for r in cell], axis=0).round(6).tolist()
        for kind in _kinds(cells)
        if len({len(r["distances"]["layers"][kind]) for cell in cells for r in cell}) == 1
    }
    row["distilled"], row["not_distilled"] = _by_part(cells)
    flat = [result for cell in cells for result in cell]
    row["parameters"] = _mean([r["costs"]["parameters"] for r in flat])
    row["macs"] = _mean([r["costs"]["macs"] for r in flat])
    row["cpu_seconds"] = _mean([r["costs"]["cpu_seconds"] for r in flat])
    row["training_cpu_seconds"] = _mean([r["made"]["cpu_seconds"] for r in flat if "cpu_seconds" in r["made"]])
    row["expected_sparsity"] = [r["made"]["sparsity"]["expected"] for r in flat]
    row["actual_sparsity"] = _mean([r["made"]["sparsity"]["actual"] for r in flat])
    row["seconds"] = {
        step: _mean([r["made"]["seconds"][step] for r in flat if step in r["made"]["seconds"]])
        for step in ("stage1", "stage2", "prune", "measure")
    }
    return row


def _paired(cells: list[list[Result]], base_cells: list[list[Result]]) -> Optional[tuple[Any, Any]]:
    """Both sides restricted to common seeds of every cell; a single row of an untrained side stays."""
    if not all(base_cells):
        return None
    sides = [cells, base_cells]
    trained = [side[0][0]["groups"] is not None or bool(side[0][0].get("recipe")) for side in sides]
    seeds = [set.intersection(*({r["seed"] for r in cell} for cell in side)) for side in sides]
    common = set.intersection(*(s for s, is_trained in zip(seeds, trained) if is_trained)) if any(trained) else seeds[0]
    if not common:
        return None
    chosen = [
        [[r for r in cell if r["seed"] in common] for cell in side] if is_trained else side
        for side, is_trained in zip(sides, trained)
    ]
    return chosen[0], chosen[1]


def _outcomes(cells: list[list[Result]], task: str) -> np.ndarray:
    """(seeds, samples of the task), the mean over the cells."""
    return np.mean([[outcomes(result["probes"][task])[0] for result in cell] for cell in cells], axis=0)


def _far(cells: list[list[Result]], kind: str) -> np.ndarray:
    """(seeds, recordings) distance to the teacher, the mean over the cells."""
    return np.mean([[result["distances"]["recordings"][kind] for result in cell] for cell in cells], axis=0)


def _kinds(cells: list[list[Result]]) -> list[str]:
    """The kinds of distance that all results have."""
    return [kind for kind in KINDS if all(kind in r["distances"]["recordings"] for cell in cells for r in cell)]


def _by_part(cells: list[list[Result]]) -> tuple[dict[str, Optional[float]], dict[str, Optional[float]]]:
    """Mean distance over distilled layers, and over the others; empty for recipes, which may distil other things than
    states of layers."""
    parts: list[dict[str, Optional[float]]] = [{}, {}]
    if any(result.get("recipe") for cell in cells for result in cell):
        return parts[0], parts[1]
    for kind in _kinds(cells):
        means: list[list[float]] = [[], []]
        for result in (result for cell in cells for result in cell):
            values = result["distances"]["layers"][kind]
            inside = {layer for group in result["groups"] or () for layer in group}
            for part, layers in enumerate((inside, set(range(len(values))) - inside)):
                mean = mean_over(values, layers)
                if mean is not None:
                    means[part].append(mean)
        for part in (0, 1):
            parts[part][kind] = _mean(means[part])
    return parts[0], parts[1]


def _mean(values: Sequence[float]) -> Optional[float]:
    return float(np.mean(values)) if len(values) else None


def plain(estimate: Estimate) -> list[Optional[float]]:
    """Value, lower and upper bound, rounded for JSON."""
    return [None if number is None else round(float(number), 6) for number in estimate]


def within_bounds(estimate: Estimate) -> Estimate:
    """Clips to the bounds of a rate, which Student's t ignores."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 1.0))


def judged(estimate: Estimate, verdicts: Mapping[Optional[int], str]) -> dict[str, Any]:
    """A difference for JSON, with the word for its verdict."""
    within = None if estimate.within is None else round(estimate.within, 6)
    return {"estimate": plain(estimate), "verdict": verdicts[estimate.verdict], "within": within}
