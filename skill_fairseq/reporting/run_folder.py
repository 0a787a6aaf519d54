"""Finds the results in a folder, by content and by the names that the examples use; nothing is required."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from skill_fairseq.reporting.shapes import HYDRA, PROBES, check, check_benchmark, check_clusters
from skill_fairseq.reporting.training_log import LOGGED, Entry, read_log

MODELS = ("shrunk", "student")
"""File stems of encoders, in the order in which they are made."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        name: its folder's name.
        log: kind -> entries, see :func:`skill_fairseq.reporting.training_log.parse_log`.
        config: the settings that hydra saved, or None.
        command: the words of the training command, as far as hydra saved them.
        cwd: the command's working folder, which relative paths start from.
        checkpoint: its last one, relative to the run's folder if inside it.
    """

    name: str
    log: dict[str, list[Entry]]
    config: Optional[dict[str, Any]]
    command: list[str]
    cwd: Path
    checkpoint: str

    @property
    def prunes(self) -> bool:
        """Whether this stage learns gates under a size constraint."""
        return any(
            name.startswith("target_sparsity")
            for entry in [*self.log["train_inner"], *self.log["train"]]
            for name in entry
        )


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run, or a benchmark if ``benchmark`` is not None; fields that were not found are None or empty.

    Attributes:
        path: the folder.
        clusters: content of clusters.json.
        stages: trainings, by name.
        models: encoders to describe: "teacher", "shrunk", "student", if their files exist.
        probes: entries of probe.json.
        valid: the validation manifest, for distances to the teacher.
        benchmark: content of results.json.
        missing: one line for each thing not found, with what the report lacks without it.
    """

    path: Path
    clusters: Optional[dict[str, Any]]
    stages: list[Stage]
    models: dict[str, Path]
    probes: list[dict[str, Any]]
    valid: Optional[Path]
    benchmark: Optional[dict[str, Any]]
    missing: list[str]


def read_run_folder(path: Path, teacher: Optional[Path] = None, data: Optional[Path] = None) -> RunFolder:
    """Reads a folder.

    Args:
        path: the folder of a run from examples/tiny/run.sh, or of a benchmark from examples/benchmark/run.py.
        teacher, data: override the paths in the training settings.

    Raises:
        FileNotFoundError: no such folder, or the given teacher or data do not exist.
        ValueError: it holds nothing to report, or a file is damaged.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give the folder of a run, such as examples/tiny/out")
    for option, given in (("--teacher", teacher), ("--data", data)):
        if given is not None and not given.exists():
            raise FileNotFoundError(f"{option}: {given} does not exist; give the path on this machine, or leave it out")
    clusters = _read(path / "clusters" / "clusters.json", check_clusters)
    benchmark = _read(path / "results.json", check_benchmark)
    probes = (_read(path / "probe.json", lambda content: check(content, PROBES)) or {}).get("results", [])
    stages = _stages(path)
    missing = []
    if clusters is None:
        missing.append("clusters/clusters.json: no similarity, dendrogram and groups; skill-cluster writes it")
    if benchmark is not None:
        return RunFolder(path, clusters, [], {}, [], None, benchmark, missing)

    models = {stem: file for stem in MODELS if (file := path / f"{stem}.safetensors").is_file()}
    teacher = teacher or _named(stages, "teacher")
    if teacher:
        models = {"teacher": teacher, **models}
    folder = data or _named(stages, "data")
    valid = folder / "valid.tsv" if folder and (folder / "valid.tsv").is_file() else None
    sizes = any(path.glob("*-0.*.safetensors"))  # from an elastic run
    if not (clusters or stages or probes or sizes or set(models) - {"teacher"}):
        raise ValueError(
            f"{path}: holds nothing to report; expected clusters/, stage1/, stage2/, shrunk.safetensors, "
            "student.safetensors, probe.json or results.json: give the folder of a run"
        )
    if not stages:
        missing.append("a folder with hydra_train.log: no curves; hydra.run.dir=RUN/stage1 puts it there")
    for stem, maker in (("shrunk", "skill-shrink"), ("student", "skill-export")):
        if stem not in models:
            missing.append(f"{stem}.safetensors: not described; {maker} writes it")
    if "teacher" not in models:
        missing.append("the teacher: no comparison with it; give --teacher FILE")
    if valid is None:
        missing.append("valid.tsv of the training data: no distance to the teacher; give --data DIR")
    if not probes:
        missing.append("probe.json: no probes; skill-probe --json prints it")
    return RunFolder(path, clusters, stages, models, probes, valid, None, missing)


def _stages(path: Path) -> list[Stage]:
    found = []
    for folder in [path, *sorted(child for child in path.iterdir() if child.is_dir())]:
        log = read_log(folder)
        if any(log[kind] for kind in LOGGED):
            config = _read(folder / ".hydra" / "config.yaml", lambda content: check(content, {str: object}))
            name = "training" if folder == path else folder.name
            found.append(Stage(name, log, config, *_command(folder), _checkpoint(path, folder, config)))
    return found


def _command(folder: Path) -> tuple[list[str], Path]:
    """The training command and its working folder; hydra saves the config's name and the overrides, but not
    --config-dir."""
    saved = _read(folder / ".hydra" / "hydra.yaml", lambda content: check(content, HYDRA))
    overrides = _read(folder / ".hydra" / "overrides.yaml", lambda content: check(content, [str])) or []
    if saved is None:
        return [], folder
    hydra = saved["hydra"]
    words = ["fairseq-hydra-train", "--config-dir", "CONFIG_DIR", "--config-name", str(hydra["job"]["config_name"])]
    words += [*overrides, *hydra.get("overrides", {}).get("hydra", [])]
    return words, Path(hydra.get("runtime", {}).get("cwd", folder))


def _checkpoint(path: Path, folder: Path, config: Optional[Mapping[str, Any]]) -> str:
    """``checkpoint_last.pt`` at the place in the settings, at fairseq's default, or beside the log: the first that
    exists, else the first."""
    places = [_setting(config, "checkpoint", "save_dir"), ".", "checkpoints"]
    files = [folder.absolute() / place / "checkpoint_last.pt" for place in places if isinstance(place, str)]
    file = next(filter(os.path.isfile, files), files[0])
    return str(file.relative_to(path.absolute()) if file.is_relative_to(path.absolute()) else file)


def _named(stages: Sequence[Stage], field: str) -> Optional[Path]:
    """A path from the settings of the first training that has one (the first of a list), if it exists on this
    machine."""
    for stage in stages:
        if stage.config:
            value = _setting(stage.config, "task", field)
            value = value[0] if isinstance(value, list) and value else value
            file = stage.cwd / value if isinstance(value, str) and value else None
            return file if file and (os.path.isfile(file) or os.path.isdir(file)) else None
    return None


def _setting(config: Optional[Mapping[str, Any]], block: str, field: str) -> Any:
    fields = (config or {}).get(block)
    return fields.get(field) if isinstance(fields, dict) else None


def _read(path: Path, checked: Callable[[Any], None]) -> Any:
    """Checked content of a JSON or YAML file; None if there is no such file.

    Raises:
        ValueError: it is damaged or has the wrong content; names the file.
    """
    if not path.is_file():
        return None
    kind = path.suffix[1:].upper()
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except Exception as error:  # PyYAML raises almost anything for odd dates, numbers and keys
        if isinstance(error, OSError):
            raise
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: is not {kind} ({said}); make it again, or remove it to leave it out") from error
    try:
        checked(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; make it again, or remove it to leave it out") from error
    return content
