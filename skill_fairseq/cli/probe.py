"""`skill-probe`: how much do frozen features know?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skill_fairseq.cli._common import Done, Parser, check_device, run
from skill_fairseq.files import check_output
from skill_fairseq.messages import require
from skill_fairseq.probing.evaluate import evaluate, require_scikit_learn
from skill_fairseq.probing.intervals import show_interval
from skill_fairseq.probing.models import resolve_model
from skill_fairseq.probing.tasks import Task, read_task
from skill_fairseq.reporting.pictures import drawing
from skill_fairseq.text_tables import aligned
from skill_fairseq.versions import versions

PICTURES = (".png", ".pdf", ".svg")
EPILOG = """models:
  FILE          any file or folder that skill_fairseq.load_encoder reads
  random:FILE   the shape of FILE with fresh random weights
  logmel        log-mel features, no model at all
  NAME=MODEL    any of these under a name of your own
  Recordings of more than a minute are encoded in pieces of equal length.

tasks:
  a folder with {train,valid,test}.tsv and {train,valid,test}.labels.tsv: mean and standard deviation over
  time of every layer, a learnt weighted sum of the layers, logistic regression; accuracy
  the same with transcripts for labels (header: utterance TAB speaker TAB transcript): weighted sum of the
  layers and a linear map over 9 frames, trained by CTC; letter error rate
  a folder with test.tsv and trials.tsv: cosine of pairs; equal error rate
  All with a 95 % interval over the test speakers, where there are 3 or more: by the labels' column, or, for
  trials, by test.speakers.tsv (header: utterance TAB speaker).

examples:
  skill-probe teacher.pt student.safetensors logmel --task tasks/digit --task tasks/speaker
  skill-probe teacher=wavlm.pt none=random:wavlm.pt --task tasks/digit --plot probe.png --json > probe.json
"""

PRINTS = {
    "results": "an entry a model and task: parameters, metric, value, its 95 % interval, samples",
    "models": "what each name stands for: kind, SHA-256",
    "tasks": "SHA-256 of each task's files",
    "seed": "of random weights",
    "versions": "packages and their versions",
}


def format_table(entries: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> str:
    """Models down, tasks across; per cent, with the interval in brackets."""
    kinds = {entry["task"]: entry["metric"] for entry in entries}
    rows = [["model", "parameters", *(f"{task.name}, {kinds[task.name]} %" for task in tasks)]]
    for entry in entries:
        if entry["task"] == tasks[0].name:
            rows.append([entry["model"], "-" if entry["parameters"] is None else f"{entry['parameters']:,}"])
        rows[-1].append(show_interval(entry["value"], entry["interval"]))
    lines = aligned(rows).splitlines()
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, *_without_interval(entries, tasks)])


def _without_interval(entries: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> list[str]:
    """A line a task, and where models differ a model: why there is no interval."""
    lines = []
    for task in tasks:
        whys = {entry["model"]: entry["no_interval"] for entry in entries if entry["task"] == task.name}
        if len(set(whys.values())) == 1:
            whys = {"": next(iter(whys.values()))}
        lines += [f"{task.name}{', ' * bool(m)}{m}: no interval: {why}" for m, why in whys.items() if why]
    return lines


def plot_bars(entries: Sequence[dict[str, Any]], tasks: Sequence[Task], path: Path) -> None:
    """Bar chart, one panel a task, with intervals where there are any."""
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    with drawing(path, (1.5 + len(tasks) * (1.2 + 0.7 * len(models)), 4)) as figure:
        for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
            shown = [entry for entry in entries if entry["task"] == task.name]
            values = np.array([100 * entry["value"] for entry in shown])
            bounds = [entry["interval"] or (entry["value"], entry["value"]) for entry in shown]
            low, high = np.array(bounds).T * 100
            reach = np.maximum([values - low, high - values], 0)
            panel.bar(models, values, yerr=reach, capsize=4, color="#4c72b0", ecolor="#333333")
            if "classes" in shown[0]:
                panel.axhline(100 / shown[0]["classes"], color="#999999", linestyle=":")
            panel.set(title=task.name, ylabel=f"{shown[0]['metric']}, %", ylim=(0, 105))
            panel.tick_params(axis="x", rotation=30)
            panel.spines[["top", "right"]].set_visible(False)


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    _check_options(args)
    tasks = [read_task(folder) for folder in args.task]
    _require_unique("--task", [task.name for task in tasks], "rename a folder")
    require_scikit_learn(tasks)
    models = [resolve_model(word, args.device, args.seed) for word in args.model]
    _require_unique("MODEL", [model.name for model in models], "name it, as in NAME=MODEL")
    entries = [
        {"model": model.name, "parameters": model.parameters, "task": task, **entry}
        for model in models
        for task, entry in evaluate(model.features, tasks, model.name).items()
    ]
    print(format_table(entries, tasks))
    if args.plot:
        plot_bars(entries, tasks, args.plot)
    packages = ["scikit-learn"] if any(task.trials is None and not task.transcribed for task in tasks) else []
    about = {
        "versions": versions(*packages),
        "seed": args.seed,
        "models": {model.name: {"kind": model.kind, "sha256": model.sha256} for model in models},
        "tasks": {task.name: task.hashes for task in tasks},
    }
    return Done({**about, "results": entries})


def _require_unique(option: str, names: Sequence[str], remedy: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{option}: {name!r} is given {names.count(name)} times, expected different names; {remedy}"
            )


def _check_options(args: argparse.Namespace) -> None:
    """What would otherwise fail only after the work."""
    if args.plot and args.plot.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot: {args.plot}, expected a name ending in {', '.join(PICTURES)}; rename it")
    if args.plot:
        require("--plot", "matplotlib")
        check_output(args.plot, "--plot")
    check_device(args.device)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-probe",
        description="Probe frozen features of models with labelled speech and print one table.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    parser.add_argument("model", nargs="+", metavar="MODEL", help="model to probe, see below")
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of a task; may be given several times",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bar chart to write: .png, .pdf or .svg")
    parser.add_device()
    parser.add_seed("random weights")
    return parser
