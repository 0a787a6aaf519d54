"""The report's section on training: curves and their numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from skill_fairseq.reporting import page, pictures
from skill_fairseq.reporting.run_folder import Stage
from skill_fairseq.reporting.training_log import Entry, series

MOST_ROWS = 50
COLUMNS = (
    ("update", "num_updates", "{:.0f}"),
    ("distillation loss", "distillation_loss", "{:.4f}"),
    ("expected sparsity", "expected_sparsity", "{:.4f}"),
    ("target", "target_sparsity", "{:.4f}"),
    ("gradient norm", "gnorm", "{:.3f}"),
    ("audio s per s", "audio_s_per_s", "{:.1f}"),
)

MEASURES = {"l1": "L1 to the teacher", "mse": "squared distance to the teacher"}
"""Distances that objectives log for every group or pair of layers."""
_TERM = re.compile(
    rf"(?:(?P<objective>\w+)_)?(?P<measure>{'|'.join(MEASURES)})_(?:g(?P<group>\d+)|s(?P<student>\d+)_t(?P<teacher>\d+))"
)


def training_section(stages: Sequence[Stage], out: Path) -> str:
    """HTML of all stages; writes their pictures into a folder."""
    parts = []
    for stage in stages:
        train, valid = stage.log["train_inner"] or stage.log["train"], stage.log["valid"]
        parts.append(f"<h3>{escape(stage.name)}</h3>" + page.paragraph(summary(stage)))
        shown = []
        losses = {"training": series(train, "distillation_loss"), "validation": series(valid, "distillation_loss")}
        losses = {label: line for label, line in losses.items() if line[0]}
        if losses:
            path = pictures.curves(pictures.file_of(out, stage.name, "loss"), losses, "distillation loss")
            shown.append(page.figure(path, f"distillation loss of {stage.name} over updates"))
        for suffix, of in targets(train).items():
            sizes = {name: series(train, f"{name}_sparsity{suffix}") for name in ("expected", "target")}
            path = pictures.file_of(out, stage.name, f"sparsity{suffix}")
            pictures.curves(path, sizes, f"sparsity{of}", dashed=["target"])
            shown.append(page.figure(path, f"expected and target sparsity{of} of {stage.name} over updates"))
        for (objective, measure), names in terms(train).items():
            lines = {label: series(train, name) for label, name in names.items()}
            of = f"{MEASURES[measure]} of {objective}" if objective else MEASURES[measure]
            path = pictures.curves(pictures.file_of(out, stage.name, f"{objective}{measure}"), lines, of)
            shown.append(page.figure(path, f"{of}, {stage.name}, over updates"))
        parts.append(page.figures(shown) + page.folded(f"Numbers of {stage.name}", points_table(train)))
    return "".join(parts)


def summary(stage: Stage) -> str:
    """A summary of a stage, in a sentence or two."""
    train, valid = stage.log["train_inner"] or stage.log["train"], stage.log["valid"]
    if not train:
        return "Nothing of its training is in the log."
    last = train[-1]
    said = [f"{last['num_updates']:.0f} updates."]
    losses = [(entry["num_updates"], entry["distillation_loss"]) for entry in train if "distillation_loss" in entry]
    if losses:
        said.append(f"Distillation loss {losses[0][1]:.4f} at the start, {losses[-1][1]:.4f} at the end.")
        bad = [update for update, loss in losses if not math.isfinite(loss)]
        if bad:
            said.append(f"{len(bad)} of {len(losses)} logged are not finite, the first at update {bad[0]:.0f}.")
    if valid and "distillation_loss" in valid[-1]:
        said.append(f"On the valid set {valid[-1]['distillation_loss']:.4f}.")
    for suffix, of in targets([last]).items():
        expected, target = (last[f"{name}_sparsity{suffix}"] for name in ("expected", "target"))
        said.append(f"Expected sparsity{of} {expected:.4f}, target {target:.4f}.")
    constraint = (stage.config or {}).get("criterion", {}).get("constraint")
    if constraint and targets([last]):
        said.append(f"Constraint: {constraint}.")
    if "wall" in last:
        said.append(f"{last['wall']:.0f} s by fairseq's clock, since its last start.")
    return " ".join(said)


def targets(entries: Sequence[Entry]) -> dict[str, str]:
    """Suffixes of the logged sparsities' names, and the cost of each; empty for a single target."""
    logged = dict.fromkeys(name for entry in entries for name in entry)
    suffixes = [name[len("target_sparsity") :] for name in logged if name.startswith("target_sparsity")]
    return {suffix: suffix.replace("_", " of ", 1) for suffix in suffixes if f"expected_sparsity{suffix}" in logged}


def points_table(entries: Sequence[Entry]) -> str:
    """The curves' points; if there are many, evenly thinned, including the last one."""
    several = [
        (f"{what} sparsity{of}", f"{what}_sparsity{suffix}", "{:.4f}")
        for suffix, of in targets(entries).items()
        for what in ("expected", "target")
        if suffix
    ]
    columns = [column for column in (*COLUMNS, *several) if any(column[1] in entry for entry in entries)]
    chosen = thinned(len(entries), MOST_ROWS)
    rows = [[form.format(entries[i][name]) if name in entries[i] else "-" for _, name, form in columns] for i in chosen]
    note = "" if len(chosen) == len(entries) else page.paragraph(f"{len(chosen)} of {len(entries)} points.")
    return note + page.table([head for head, _, _ in columns], rows)


def thinned(number: int, most: int) -> list[int]:
    """At most this many of the indices below a number, evenly spaced, including the first and the last."""
    if number <= most:
        return list(range(number))
    return [round(i * (number - 1) / (most - 1)) for i in range(most)]


def terms(entries: Sequence[Entry]) -> dict[tuple[str, str], dict[str, str]]:
    """The logged distances of groups and of pairs of layers, by objective and measure.

    Returns:
        (name of the objective, "" if the criterion has only one; key of :data:`MEASURES`) -> label of each curve ->
        its name in the log.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        match = _TERM.fullmatch(name)
        if match:
            group, own, theirs = match["group"], match["student"], match["teacher"]
            label = f"group {group}" if group else f"layer {own} to {theirs}"
            found.setdefault((match["objective"] or "", match["measure"]), {})[label] = name
    return found
