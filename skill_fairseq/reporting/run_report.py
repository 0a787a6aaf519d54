"""The report of one run, section by section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import yaml

import skill_fairseq
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.source import build_encoder
from skill_fairseq.clustering.plot import plot_clusters
from skill_fairseq.probing.intervals import show_interval
from skill_fairseq.reporting import page, pictures
from skill_fairseq.reporting.encoder_sections import cost_section, distance_section, first_recordings, units_section
from skill_fairseq.reporting.run_folder import RunFolder, Stage
from skill_fairseq.reporting.sizes_section import size_files, sizes_section
from skill_fairseq.reporting.training_section import training_section
from skill_fairseq.versions import versions

CONFIGS = Path(skill_fairseq.__file__).parent / "config"
CHECKED_OUT = Path(skill_fairseq.__file__).parents[1] / "config"


def run_report(folder: RunFolder, out: Path, max_seconds: float) -> str:
    """Builds the page; writes its pictures into a folder.

    Args:
        folder: the results that were found.
        out: folder of the pictures.
        max_seconds: audio for the distance to the teacher, seconds.

    Raises:
        ValueError: an encoder's file is damaged.
    """
    missing = list(folder.missing)
    sources = {name: read_source(path) for name, path in folder.models.items()}
    encoders = {name: build_encoder(source, folder.models[name]).eval() for name, source in sources.items()}
    students = [name for name in encoders if name != "teacher"]
    sections: list[tuple[str, str]] = []
    if encoders:
        sections.append(("Size and speed", cost_section(encoders, folder.models)))
    if folder.probes:
        sections.append(("What frozen features know", probe_section(folder.probes, out)))
    try:
        sizes = size_files(folder.path)
        if sizes:
            heard = [] if folder.valid is None else first_recordings(folder.valid, max_seconds)[0]
            html = sizes_section(sizes, encoders.get("teacher"), heard, folder.probes, out)
            sections.append(("Every size of one run", html))
    except (ValueError, OSError) as error:
        missing.append(f"sizes: {error}")
    groups = None if folder.clusters is None else folder.clusters["groups"]
    if "teacher" in encoders and students and folder.valid:
        try:
            html = distance_section(encoders, folder.valid, max_seconds, groups, out)
            sections.append(("Distance to the teacher", html))
        except (ValueError, OSError) as error:
            missing.append(f"distance to the teacher: {error}")
    if folder.stages:
        sections.append(("Training", training_section(folder.stages, out)))
    if students:
        sections.append((f"What is left: {students[-1]}", units_section(encoders[students[-1]].config, out)))
    if folder.clusters is not None:
        sections.append(("Layer similarity and groups", cluster_section(folder.clusters, out)))
    provenance = {name: dict(sources[name].provenance) for name in students}
    sections.append(("Settings and versions", settings_section(folder.clusters, folder.stages, provenance)))
    sections.append(("How to repeat it", repeat_section(folder, provenance)))
    if missing:
        sections.append(("Left out", page.paragraph("Looked for and not found:") + page.bullets(missing)))
    about = page.paragraph(_about(encoders))
    return page.page(f"Report: {folder.path.resolve().name}", about, sections)


def _about(encoders: Mapping[str, Any]) -> str:
    sizes = {name: encoder.num_parameters() for name, encoder in encoders.items()}
    if "teacher" in sizes and len(sizes) > 1:
        name, size = list(sizes.items())[-1]
        return f"{name}: {size:,} of the teacher's {sizes['teacher']:,} parameters ({size / sizes['teacher']:.1%})."
    return "; ".join(f"{name}: {size:,} parameters" for name, size in sizes.items())


def probe_section(entries: list[dict[str, Any]], out: Path) -> str:
    """Table and pictures of skill-probe's results, with its 95 % intervals."""
    tasks = {entry["task"]: entry["metric"] for entry in entries}
    models = {entry["model"]: entry["parameters"] for entry in entries}
    cells = {(entry["model"], entry["task"]): entry for entry in entries}
    rows, shown = [], []
    for model, parameters in models.items():
        row = [model, "-" if parameters is None else f"{parameters:,}"]
        for task in tasks:
            entry = cells.get((model, task))
            row.append("-" if entry is None else show_interval(entry["value"], entry["interval"]) + _count(entry))
        rows.append(row)
    for task, metric in tasks.items():
        lines = [
            (model, pictures.in_percent(*_estimate(cells[model, task]))) for model in models if (model, task) in cells
        ]
        teacher = cells.get(("teacher", task))
        reference = None if teacher is None else 100 * teacher["value"]
        path = pictures.forest(pictures.file_of(out, "probe", task), lines, f"{task}: {metric}, %", reference)
        caption = "dashed: the teacher's value; in colour: intervals that exclude it" if teacher else None
        shown.append(page.figure(path, f"{metric} on {task} with intervals", caption))
    head = ["model", "parameters", *(f"{task}: {metric}, %" for task, metric in tasks.items())]
    about = "In brackets, and as bars, 95 % intervals over speakers."
    whys = {(entry["task"], entry["no_interval"]) for entry in entries if entry.get("no_interval")}
    about += "".join(f" {task}: no interval: {why}." for task, why in sorted(whys))
    return page.paragraph(about) + page.table(head, rows) + page.figures(shown)


def _count(entry: Mapping[str, Any]) -> str:
    return f", {entry['correct']} of {entry['total']}" if "correct" in entry and "total" in entry else ""


def _estimate(entry: Mapping[str, Any]) -> tuple[float, Optional[float], Optional[float]]:
    low, high = entry["interval"] or (None, None)
    return entry["value"], low, high


def cluster_section(clusters: Mapping[str, Any], out: Path) -> str:
    """Heat map, dendrogram, and the groups."""
    layers, measure = clusters["layers"], clusters["measure"]
    index = {layer: i for i, layer in enumerate(layers)}
    groups = [[index[layer] for layer in group] for group in clusters["groups"]]
    distances, tree = np.array(clusters["matrices"][measure]), np.array(clusters["linkage"])
    title = f"{len(groups)} groups of {len(layers)} layers by {measure}"
    picture = out / "clusters.png"
    plot_clusters(picture, distances, tree, groups, clusters["cut"]["height"], layers, measure, title)
    calibration = clusters["calibration"]
    about = (
        f"{title}, {clusters['settings']['linkage']} linkage, on {calibration['num_utterances']} recordings "
        f"({calibration['seconds']:.1f} s, {calibration['num_frames']} frames)."
    )
    rows = []
    for number, group in enumerate(groups):
        inside = distances[np.ix_(group, group)]
        mean = f"{inside.sum() / (len(group) * (len(group) - 1)):.4f}" if len(group) > 1 else "-"
        rows.append([str(number), ", ".join(str(layers[i]) for i in group), mean])
    table = page.table(["group", "layers", "mean distance within"], rows)
    return page.paragraph(about) + table + page.figure(picture, "similarity of layers and dendrogram", wide=True)


def settings_section(clusters: Optional[Mapping[str, Any]], stages: list[Stage], provenance: Mapping[str, Any]) -> str:
    """Versions, and all saved settings."""
    made = {"this page": versions()}
    if clusters is not None:
        made = {"clustering": dict(clusters["versions"]), **made}
    names = list(dict.fromkeys(name for found in made.values() for name in found))
    rows = [[what, *(found.get(name, "-") for name in names)] for what, found in made.items()]
    parts = [page.table(["made with", *names], rows)]
    if clusters is not None:
        shown = {key: clusters[key] for key in ("teacher", "measure", "settings", "calibration")}
        parts.append(page.folded("Clustering", page.code(as_yaml(shown))))
    for stage in stages:
        if stage.config:
            parts.append(page.folded(f"{stage.name}: the whole config", page.code(as_yaml(stage.config))))
    for name, found in provenance.items():
        if found:
            parts.append(page.folded(f"{name}.safetensors: where it says it comes from", page.code(as_yaml(found))))
    return "".join(parts)


class _Dumper(yaml.SafeDumper):
    """One setting per line, as in configs; lists stay on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: Optional[bool] = None) -> yaml.Node:
        return super().represent_sequence(tag, sequence, flow_style=True)


def as_yaml(content: Any) -> str:
    """Settings as YAML."""
    try:
        return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)).strip()
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with thousands of digits
        return f"cannot be shown: {error}"


def repeat_section(folder: RunFolder, provenance: Mapping[str, Mapping[str, Any]]) -> str:
    """The commands that made this folder, with their options."""
    commands = []
    if folder.clusters is not None:
        commands.append(cluster_command(folder.clusters))
    pruned = None
    for stage in folder.stages:
        if stage.command:
            commands.append(_with_config_dir(stage))
        if stage.prunes:
            pruned = stage.checkpoint
    if pruned and "shrunk" in folder.models:
        commands.append(["skill-shrink", pruned, "shrunk.safetensors"])
        commands[-1] += _shrink_options(provenance.get("shrunk", {}))
    if "student" in folder.models and folder.stages:
        commands.append(["skill-export", folder.stages[-1].checkpoint, "student.safetensors"])
    if folder.probes:
        tasks = list(dict.fromkeys(entry["task"] for entry in folder.probes))
        models = list(dict.fromkeys(entry["model"] for entry in folder.probes))
        files = {name: str(path.absolute()) if name == "teacher" else path.name for name, path in folder.models.items()}
        words = [f"{model}={files.get(model, 'MODEL')}" if model != "logmel" else model for model in models]
        commands.append(["skill-probe", *words, *(w for t in tasks for w in ("--task", f"TASKS/{t}")), "--json"])
    commands.append(["skill-report", str(folder.path)])
    if "teacher" in folder.models:
        commands[-1] += ["--teacher", str(folder.models["teacher"].absolute())]
    if folder.valid is not None:
        commands[-1] += ["--data", str(folder.valid.parent.absolute())]
    said = "Run these in the run's folder; config/ is skill_fairseq's."
    if folder.clusters is not None:
        said += " Of skill-cluster's files only the names were saved, not the folders."
    text = " ".join(word for command in commands for word in command)
    unknown = [word for word in ("CONFIG_DIR", "MODEL", "TASKS") if re.search(rf"\b{word}\b", text)]
    if unknown:
        said += f" Words in capitals ({', '.join(unknown)}) stand for values that the folder does not hold."
    into = {"skill-probe": "probe.json"}
    return "".join(page.command(command, into.get(command[0])) for command in commands) + page.paragraph(said)


def _shrink_options(provenance: Mapping[str, Any]) -> list[str]:
    """How the size was chosen, as far as the file records it."""
    sizes = provenance.get("sparsity")
    asked = sizes.get("asked", "") if isinstance(sizes, dict) else ""
    if isinstance(asked, (int, float)):
        return ["--sparsity", f"{asked:g}"]
    return ["--by-rounding"] if asked is None else []


def cluster_command(clusters: Mapping[str, Any]) -> list[str]:
    """The skill-cluster command, with every option that differs from its default."""
    settings = clusters["settings"]
    teachers = clusters["teacher"] if isinstance(clusters["teacher"], list) else [clusters["teacher"]]
    command = ["skill-cluster", "--teacher", *(teacher["name"] for teacher in teachers)]
    command += ["--manifest", clusters["calibration"]["manifest"]]
    command += ["--measure", clusters["measure"], "--linkage", settings["linkage"]]
    if clusters["cut"]["by"] == "height":
        command += ["--height", f"{settings['height']:g}"]
    elif clusters["cut"]["by"] == "silhouette":
        command += ["--silhouette", *map(str, settings["silhouette"])]
    else:
        command += ["--num-groups", str(settings["num_groups"])]
    command += [f"--{name.replace('_', '-')}" for name in ("neighbours_only", "no_layer_0") if settings[name]]
    limit = settings["max_seconds"]
    command += ["--max-seconds", "inf" if limit is None else f"{limit:g}"]
    if settings["max_utterances"] is not None:
        command += ["--max-utterances", str(settings["max_utterances"])]
    return [*command, "--seed", str(settings["seed"]), "--out", "clusters"]


def _with_config_dir(stage: Stage) -> list[str]:
    """The command; its config's folder is filled in if this package has a config of that name."""
    kind = "distill" if stage.prunes else "final"
    name = stage.command[stage.command.index("--config-name") + 1]
    known = any((configs / kind / f"{name}.yaml").is_file() for configs in (CONFIGS, CHECKED_OUT))
    return [f"config/{kind}" if word == "CONFIG_DIR" and known else word for word in stage.command]
