"""From the results of single runs to means, intervals, differences and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from skill_fairseq.comparison.layer_distance import KINDS, mean_over
from skill_fairseq.comparison.measure import outcomes
from skill_fairseq.comparison.statistics import Estimate, crossed_mean, paired_difference
from skill_fairseq.probing.intervals import wilson

Result = Mapping[str, Any]
OVERALL = "all"
"""In place of a sparsity: the mean over all of them."""

PROBE_VERDICTS = {1: "higher", 0: "no difference", -1: "lower"}
SHOWN = {"l1_normalized": "L1", "cos": "1 - cos", "cka": "1 - CKA"}
"""Distances that tables show, under which name."""
DISTANCE_VERDICTS = {1: "farther", 0: "no difference", -1: "nearer"}


def summarise(results: Sequence[Result], references: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """Everything that the tables show.

    Args:
        results: one a method, sparsity and seed.
        references: name -> probes and perhaps costs, of what is not distilled.
        baseline: the method that differences are to.

    Returns:
        ``rows``: one a method and sparsity (the mean over sparsities under "all", where a method has been run
        with the same seeds at all of them), for JSON.
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
        "tasks": {task: {key: results[0]["probes"][task][key] for key in ("metric", "samples")} for task in tasks},
        "references": {name: _reference(found) for name, found in references.items()},
        "rows": rows,
        "versions": results[0]["versions"],
    }


def _reference(found: Mapping[str, Any]) -> dict[str, Any]:
    probes = {}
    for task, entry in found["probes"].items():
        if entry["metric"] == "accuracy":
            estimate = Estimate(entry["value"], *wilson(entry["correct"], entry["total"]))
        else:
            estimate = crossed_mean(outcomes(entry)[None])
        probes[task] = _plain(_rate(estimate))
    return {"probes": probes, "costs": found.get("costs")}


def _row(
    method: str, sparsity: Any, cells: list[list[Result]], base_cells: list[list[Result]], tasks: Sequence[str]
) -> dict[str, Any]:
    """One method at one sparsity, or over several: a cell each, of results by seed."""
    if not all(cells):
        return {}
    seeds = [result["seed"] for result in cells[0]]
    row: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "seeds": seeds,
        "made_by": sorted({r.get("made_by", method) for cell in cells for r in cell}),
        "groups": [result["groups"] for result in cells[0]],
        "probes": {},
        "difference": {},
        "distance": {},
        "distance_difference": {},
    }
    paired = _paired(cells, base_cells)
    for task in tasks:
        row["probes"][task] = _plain(_rate(crossed_mean(_outcomes(cells, task))))
        if paired:
            values, baseline = (_outcomes(side, task) for side in paired)
            row["difference"][task] = _judged(paired_difference(values, baseline), PROBE_VERDICTS)
    for kind in KINDS:
        row["distance"][kind] = _plain(crossed_mean(_far(cells, kind)))
        if paired:
            values, baseline = (_far(side, kind) for side in paired)
            row["distance_difference"][kind] = _judged(paired_difference(values, baseline), DISTANCE_VERDICTS)
    row["layers"] = {
        kind: np.mean([r["distances"]["layers"][kind] for cell in cells for r in cell], axis=0).round(6).tolist()
        for kind in KINDS
    }
    row["distilled"], row["not_distilled"] = _by_part(cells)
    flat = [result for cell in cells for result in cell]
    row["parameters"] = _mean([r["costs"]["parameters"] for r in flat])
    row["macs"] = _mean([r["costs"]["macs"] for r in flat])
    row["cpu_seconds"] = _mean([r["costs"]["cpu_seconds"] for r in flat])
    row["expected_sparsity"] = [r["made"]["sparsity"]["expected"] for r in flat]
    row["actual_sparsity"] = _mean([r["made"]["sparsity"]["actual"] for r in flat])
    row["seconds"] = {
        step: _mean([r["made"]["seconds"][step] for r in flat if step in r["made"]["seconds"]])
        for step in ("stage1", "stage2", "prune", "measure")
    }
    return row


def _paired(cells: list[list[Result]], base_cells: list[list[Result]]) -> Optional[tuple[Any, Any]]:
    """Both sides with the seeds that both have, the same in every cell; one lone row of an untrained side stays."""
    if not all(base_cells):
        return None
    sides = [cells, base_cells]
    trained = [side[0][0]["groups"] is not None for side in sides]
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
    return np.mean([[outcomes(result["probes"][task]) for result in cell] for cell in cells], axis=0)


def _far(cells: list[list[Result]], kind: str) -> np.ndarray:
    """(seeds, recordings) distance to the teacher, the mean over the cells."""
    return np.mean([[result["distances"]["recordings"][kind] for result in cell] for cell in cells], axis=0)


def _by_part(cells: list[list[Result]]) -> tuple[dict[str, Optional[float]], dict[str, Optional[float]]]:
    """Mean distance over the layers that are distilled, and over those that are not."""
    parts: list[dict[str, Optional[float]]] = [{}, {}]
    for kind in KINDS:
        means: list[list[float]] = [[], []]
        for result in (result for cell in cells for result in cell):
            values = result["distances"]["layers"][kind]
            inside = set(result["distilled_layers"])
            for part, layers in enumerate((inside, set(range(len(values))) - inside)):
                mean = mean_over(values, layers)
                if mean is not None:
                    means[part].append(mean)
        for part in (0, 1):
            parts[part][kind] = _mean(means[part])
    return parts[0], parts[1]


def _mean(values: Sequence[float]) -> Optional[float]:
    return float(np.mean(values)) if len(values) else None


def _plain(estimate: Estimate) -> list[float]:
    return [round(float(number), 6) for number in estimate]


def _rate(estimate: Estimate) -> Estimate:
    """Student's t knows no bounds, rates do."""
    return Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 1.0))


def _judged(estimate: Estimate, verdicts: Mapping[int, str]) -> dict[str, Any]:
    return {"estimate": _plain(estimate), "verdict": verdicts[estimate.verdict]}


def introduction(summary: Mapping[str, Any]) -> str:
    """How many results there are, and how their intervals and differences are meant: plain text."""
    return (
        f"{summary.get('found')} of {summary.get('wanted')} results are there. Probes: {about_tasks(summary)}. "
        "Intervals are of 95 %, over seeds and recordings together (two-way random effects; error rates: over seeds "
        "and speakers, by jackknife); of what is not distilled, over recordings (Wilson) or speakers. "
        f"A difference to {summary['baseline']} is paired by seed and recording or speaker, and counts as none where "
        "its interval holds 0. Each interval stands for itself: of twenty, one misses by chance."
    )


def write_tables(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    parts = [
        introduction(summary),
        "## Verdict\n\n" + "\n".join(verdicts(summary)),
        "## Not distilled\n\n" + _markdown(*_reference_table(summary)),
    ]
    for sparsity in dict.fromkeys(row["sparsity"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["sparsity"] == sparsity]
        found = sparsity_tables(rows, summary)
        title = "Mean over sparsities" if sparsity == OVERALL else f"Sparsity {sparsity:g}"
        parts += [f"## {title}", _markdown(*found["probes"])]
        parts.append("Distance to the teacher, whole valid recordings; L1 of states normalised frame by frame.")
        parts += [_markdown(*found[name]) for name in ("distance", "costs") if name in found]
    return "\n\n".join(parts) + "\n"


def sparsity_tables(rows: Sequence[Any], summary: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Head and lines of the tables of rows of one sparsity: probes, distance, costs (not over all sparsities), and
    references."""
    baseline = summary["baseline"]
    found = {
        "probes": _probe_table(rows, summary),
        "distance": _distance_table(rows, baseline),
        "references": _reference_table(summary),
    }
    if rows[0]["sparsity"] != OVERALL:
        found["costs"] = _cost_table(rows)
    return found


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """One line a method: what its differences to the baseline say, over all sparsities, else at each."""
    lines = []
    keys = [row["sparsity"] for row in summary["rows"]]
    wanted = [OVERALL] if OVERALL in keys else list(dict.fromkeys(keys))
    for row in summary["rows"]:
        if row["sparsity"] in wanted and row["method"] != summary["baseline"] and row["difference"]:
            where = "over all sparsities" if row["sparsity"] == OVERALL else f"at sparsity {row['sparsity']:g}"
            said = [f"{task} {_points(d['estimate'])}: {d['verdict']}" for task, d in row["difference"].items()]
            for kind in ("l1_normalized", "cka"):
                d = row["distance_difference"][kind]
                said.append(f"{SHOWN[kind]} to the teacher {_interval(d['estimate'], 1, 4, True)}: {d['verdict']}")
            seeds = f"{len(row['seeds'])} seed{'s' * (len(row['seeds']) > 1)}"
            of = f"- **{row['method']}** against {summary['baseline']}, {where}, {seeds}"
            lines.append(f"{of}: {'; '.join(said)}")
    return lines or ["- nothing to compare yet"]


def about_tasks(summary: Mapping[str, Any]) -> str:
    """What each probe task measures on what, in one sentence part."""
    tasks = summary["tasks"].items()
    return "; ".join(f"{task}, {what['metric']} in per cent, {what['samples']}" for task, what in tasks)


def _in_percent(task: str, summary: Mapping[str, Any]) -> str:
    return f"{task}{' error' * (summary['tasks'][task]['metric'] != 'accuracy')} %"


def _reference_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows, tasks = [], list(summary["tasks"])
    for name, found in summary["references"].items():
        costs = found["costs"]
        rows.append([name, *(_interval(found["probes"][task], 100, 1) for task in tasks)])
        rows[-1] += ["-"] * 3 if costs is None else _costs(costs["parameters"], costs["macs"], costs["cpu_seconds"])
    return ["model", *(_in_percent(task, summary) for task in tasks), "parameters", "G MACs", "CPU s"], rows


def _probe_table(rows: Sequence[Any], summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    baseline = summary["baseline"]
    head = ["method", "seeds"]
    for task in summary["tasks"]:
        head += [_in_percent(task, summary), f"less {baseline}, points"]
    head.append("groups")
    table = []
    for row in rows:
        line = [row["method"], str(len(row["seeds"]))]
        for task in summary["tasks"]:
            line.append(_interval(row["probes"][task], 100, 1))
            line.append(_difference(row, row["difference"].get(task), baseline, 100, 1))
        table.append([*line, _groups(row)])
    return head, table


def _distance_table(rows: Sequence[Any], baseline: str) -> tuple[list[str], list[list[str]]]:
    head, table = ["method"], []
    for name in SHOWN.values():
        head += [name, f"less {baseline}"]
    for name in SHOWN.values():
        head += [f"{name}, distilled layers", "other layers"]
    for row in rows:
        line = [row["method"]]
        for kind in SHOWN:
            line.append(_interval(row["distance"][kind], 1, 3))
            line.append(_difference(row, row["distance_difference"].get(kind), baseline, 1, 3))
        for kind in SHOWN:
            line += [_number(row[part][kind]) for part in ("distilled", "not_distilled")]
        table.append(line)
    return head, table


def _cost_table(rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "parameters", "G MACs, 10 s", "CPU s, 10 s", "sparsity", "expected by the gates"]
    head += ["stage 1, s", "stage 2, s", "measuring, s"]
    table = []
    for row in rows:
        expected = [value for value in row["expected_sparsity"] if value is not None]
        line = [row["method"], *_costs(row["parameters"], row["macs"], row["cpu_seconds"])]
        line += [f"{row['actual_sparsity']:.4f}", f"{min(expected):.4f} to {max(expected):.4f}" if expected else "-"]
        line += [_number(row["seconds"][step], 0) for step in ("stage1", "stage2", "measure")]
        table.append(line)
    return head, table


def _groups(row: Mapping[str, Any]) -> str:
    """The groups in one line; where seeds differ, so it says; where another method has the same run, which."""
    if any(groups != row["groups"][0] for groups in row["groups"]):
        return "by seed"
    if row["groups"][0] is None:
        return "-"
    shown = " ".join("{" + ",".join(map(str, group)) + "}" for group in row["groups"][0])
    others = [name for name in row["made_by"] if name != row["method"]]
    return f"{shown} (runs of {', '.join(others)})" if others else shown


def _difference(row: Mapping[str, Any], found: Any, baseline: str, scale: float, digits: int) -> str:
    if row["method"] == baseline or not found:
        return "-"
    return f"{_interval(found['estimate'], scale, digits, True)} {found['verdict']}"


def _costs(parameters: float, macs: float, seconds: float) -> list[str]:
    return [f"{parameters:,.0f}", f"{macs / 1e9:.3f}", f"{seconds:.3f}"]


def _interval(estimate: Sequence[float], scale: float, digits: int, signed: bool = False) -> str:
    value, low, high = (f"{scale * number:{'+' if signed else ''}.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"


def _points(estimate: Sequence[float]) -> str:
    return f"{_interval(estimate, 100, 1, True)} points"


def _number(value: Optional[float], digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
