"""Tables and sentences with the results of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from skill_fairseq.comparison.layer_distance import SHOWN
from skill_fairseq.comparison.summary import NO_INTERVAL, NOT_TOLD, OVERALL
from skill_fairseq.probing.intervals import show_interval
from skill_fairseq.text_tables import markdown


def introduction(summary: Mapping[str, Any]) -> str:
    """The number of results, and how to read intervals and differences; plain text."""
    return (
        f"{summary.get('found')} of {summary.get('wanted')} results are there. Probes: {about_tasks(summary)}. "
        "Intervals are 95 %, over seeds and speakers together (two-way random effects; error rates by jackknife); for "
        f"models that are not distilled, over speakers.{_left_out(summary)} "
        f"A difference to {summary['baseline']} is paired by seed and recording. If its interval contains 0, the two "
        "are not distinguishable: the data allow differences up to the given bound. "
        "Intervals are not corrected for multiple comparisons: one in twenty misses by chance."
    )


def _markdown(table: tuple[list[str], list[list[str]]]) -> str:
    return markdown([table[0], *table[1]])


def _left_out(summary: Mapping[str, Any]) -> str:
    """Values without an interval, and why."""
    what = {**summary["tasks"], "distances to the teacher": summary["distances"]}
    found = [f"{name} ({about['no_interval']})" for name, about in what.items() if about["no_interval"]]
    return f" Without an interval: {'; '.join(found)}." if found else ""


def write_tables(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    parts = [
        introduction(summary),
        "## Verdict\n\n" + "\n".join(verdicts(summary)),
        "## Not distilled\n\n" + _markdown(_reference_table(summary)),
    ]
    for sparsity in dict.fromkeys(row["sparsity"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["sparsity"] == sparsity]
        found = sparsity_tables(rows, summary)
        title = "Mean over sparsities" if sparsity == OVERALL else f"Sparsity {sparsity:g}"
        parts += [f"## {title}", _markdown(found["probes"])]
        parts.append("Distance to the teacher, whole valid recordings; L1 of states normalised frame by frame.")
        parts += [_markdown(found[name]) for name in ("distance", "costs") if name in found]
    return "\n\n".join(parts) + "\n"


def sparsity_tables(rows: Sequence[Any], summary: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and rows of the tables for one sparsity: probes, distance, costs (not over all sparsities), and
    references."""
    baseline = summary["baseline"]
    found = {
        "probes": _probe_table(rows, summary),
        "distance": _distance_table(rows, baseline),
        "references": _reference_table(summary),
    }
    if rows[0]["sparsity"] != OVERALL:
        found["costs"] = _cost_table(rows, summary)
    return found


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """One line per method: its differences to the baseline, over all sparsities or else at each."""
    lines = []
    keys = [row["sparsity"] for row in summary["rows"]]
    wanted = [OVERALL] if OVERALL in keys else list(dict.fromkeys(keys))
    for row in summary["rows"]:
        if row["sparsity"] in wanted and row["method"] != summary["baseline"] and row["difference"]:
            where = "over all sparsities" if row["sparsity"] == OVERALL else f"at sparsity {row['sparsity']:g}"
            said = [f"{task} {show_difference(d, 100, 1, ' points')}" for task, d in row["difference"].items()]
            for kind in ("l1_normalized", "cka"):
                if kind in row["distance_difference"]:
                    said.append(
                        f"{SHOWN[kind]} to the teacher {show_difference(row['distance_difference'][kind], 1, 4, '')}"
                    )
            seeds = f"{len(row['seeds'])} seed{'s' * (len(row['seeds']) > 1)}"
            of = f"- **{row['method']}** against {summary['baseline']}, {where}, {seeds}"
            lines.append(f"{of}: {'; '.join(said)}")
    return lines or ["- nothing to compare yet"]


def about_tasks(summary: Mapping[str, Any]) -> str:
    """Metric and samples of each probe task, as part of a sentence."""
    tasks = summary["tasks"].items()
    return "; ".join(f"{task}, {what['metric']} in per cent, {what['samples']}" for task, what in tasks)


def _in_percent(task: str, summary: Mapping[str, Any]) -> str:
    return f"{task}{' error' * (summary['tasks'][task]['metric'] != 'accuracy')} %"


def _reference_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows, tasks = [], list(summary["tasks"])
    for name, found in summary["references"].items():
        rows.append([name, *(show_estimate(found["probes"][task], 100, 1) for task in tasks)])
        rows[-1] += ["-"] * 3 if found["costs"] is None else _costs(found["costs"])
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
            line.append(show_estimate(row["probes"][task], 100, 1))
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
            line.append(show_estimate(row["distance"][kind], 1, 3) if kind in row["distance"] else "-")
            line.append(_difference(row, row["distance_difference"].get(kind), baseline, 1, 3))
        for kind in SHOWN:
            line += [_number(row[part].get(kind)) for part in ("distilled", "not_distilled")]
        table.append(line)
    return head, table


def _cost_table(rows: Sequence[Any], summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "parameters", "G MACs, 10 s", "CPU s, 10 s", "sparsity", "expected by the gates"]
    head += ["training, CPU s", "stage 1, s", "stage 2, s", "measuring, s"]
    references = summary["references"].items()
    table = [[name, *_costs(found["costs"]), *["-"] * 6] for name, found in references if found["costs"] is not None]
    for row in rows:
        expected = [value for value in row["expected_sparsity"] if value is not None]
        line = [row["method"], *_costs(row)]
        line += [f"{row['actual_sparsity']:.4f}", f"{min(expected):.4f} to {max(expected):.4f}" if expected else "-"]
        line.append(_number(row.get("training_cpu_seconds"), 0))
        line += [_number(row["seconds"][step], 0) for step in ("stage1", "stage2", "measure")]
        table.append(line)
    return head, table


def _groups(row: Mapping[str, Any]) -> str:
    """The groups in one line; notes if seeds differ, and which other methods share the run."""
    if any(groups != row["groups"][0] for groups in row["groups"]):
        return "by seed"
    if row.get("recipe"):
        return str(row["recipe"])
    if row["groups"][0] is None:
        return "-"
    shown = " ".join("{" + ",".join(map(str, group)) + "}" for group in row["groups"][0])
    others = [name for name in row["made_by"] if name != row["method"]]
    return f"{shown} (runs of {', '.join(others)})" if others else shown


def _difference(row: Mapping[str, Any], found: Any, baseline: str, scale: float, digits: int) -> str:
    if row["method"] == baseline or not found:
        return "-"
    return show_difference(found, scale, digits)


def _costs(of: Mapping[str, Any]) -> list[str]:
    return [f"{of['parameters']:,.0f}", f"{of['macs'] / 1e9:.3f}", f"{of['cpu_seconds']:.3f}"]


def show_estimate(estimate: Sequence[Optional[float]], scale: float, digits: int, signed: bool = False) -> str:
    """A mean and its interval, see :func:`skill_fairseq.probing.intervals.show_interval`, or that there is none."""
    value, low, high = estimate
    bounds = None if low is None or high is None else (low, high)
    return show_interval(value or 0.0, bounds, scale, digits, signed) + ("" if bounds else f" ({NO_INTERVAL})")


def show_difference(found: Mapping[str, Any], scale: float, digits: int, unit: Optional[str] = None) -> str:
    """A difference and its verdict; with a unit, as part of a sentence."""
    said = show_estimate(found["estimate"], scale, digits, True) + (unit or "")
    if found["verdict"] == NO_INTERVAL:
        return said
    if unit is not None:
        said += ":"
    within = f" within \u00b1{scale * found['within']:.{digits}f}{unit or ''}" if found["verdict"] == NOT_TOLD else ""
    return f"{said} {found['verdict']}{within}"


def _number(value: Optional[float], digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
