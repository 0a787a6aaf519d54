"""What lies in a folder of results: found by content and by the names that the examples use; nothing is required."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import yaml

from skill_fairseq.reporting.training_log import KINDS, Entry, read_log

MODELS = ("shrunk", "student")
"""File stems of encoders, in the order of their making."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        name: of its folder.
        log: kind -> entries, see :func:`skill_fairseq.reporting.training_log.parse_log`.
        config: what hydra saved of the settings, or None.
        command: the words of the command that trained, as far as hydra saved them.
    """

    name: str
    log: dict[str, list[Entry]]
    config: Optional[dict[str, Any]]
    command: list[str]

    @property
    def prunes(self) -> bool:
        """Whether it learns gates under a size constraint."""
        return any("target_sparsity" in entry for entry in [*self.log["train_inner"], *self.log["train"]])


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run, or a benchmark where ``benchmark`` is not None; what was not found is None or empty.

    Attributes:
        path: the folder.
        clusters: content of clusters.json.
        stages: trainings, by name.
        models: encoders to describe: "teacher", "shrunk", "student", as far as their files are there.
        probes: entries of probe.json.
        valid: manifest of validation, for distances to the teacher.
        benchmark: content of results.json.
        missing: what was looked for and not found, one line each, with what the report lacks for it.
    """

    path: Path
    clusters: Optional[dict[str, Any]]
    stages: list[Stage]
    models: dict[str, Path]
    probes: list[dict[str, Any]]
    valid: Optional[Path]
    benchmark: Optional[dict[str, Any]]
    missing: list[str]


def read_folder(path: Path, teacher: Optional[Path] = None, data: Optional[Path] = None) -> RunFolder:
    """Looks through a folder.

    Args:
        path: of a run, as examples/tiny/run.sh makes it, or of a benchmark, as examples/benchmark/run.py makes it.
        teacher, data: in place of the paths that the training's settings name.

    Raises:
        FileNotFoundError: no such folder, or the teacher or data given is not there.
        ValueError: nothing of what a report shows is in it, or a file is damaged.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give the folder of a run, such as examples/tiny/out")
    for option, given in (("--teacher", teacher), ("--data", data)):
        if given is not None and not given.exists():
            raise FileNotFoundError(f"{option}: {given} does not exist; give the path on this machine, or leave it out")
    clusters, benchmark = _json(path / "clusters" / "clusters.json"), _json(path / "results.json")
    probes = (_json(path / "probe.json") or {}).get("results", [])
    stages = _stages(path)
    missing = []
    if clusters is None:
        missing.append("clusters/clusters.json: no similarity, dendrogram and groups; skill-cluster writes it")
    if benchmark is not None:
        return RunFolder(path, clusters, [], {}, [], None, benchmark, missing)

    models = {stem: file for stem in MODELS if (file := path / f"{stem}.safetensors").is_file()}
    config = next((stage.config for stage in stages if stage.config), None)
    teacher = teacher or _named(config, "teacher")
    if teacher:
        models = {"teacher": teacher, **models}
    folder = data or _named(config, "data")
    valid = folder / "valid.tsv" if folder and (folder / "valid.tsv").is_file() else None
    if not (clusters or stages or probes or set(models) - {"teacher"}):
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
        missing.append("probe.json: no probes; skill-probe --json writes it")
    return RunFolder(path, clusters, stages, models, probes, valid, None, missing)


def _stages(path: Path) -> list[Stage]:
    found = []
    for folder in [path, *sorted(child for child in path.iterdir() if child.is_dir())]:
        log = read_log(folder)
        if any(log[kind] for kind in KINDS):
            name = "training" if folder == path else folder.name
            found.append(Stage(name, log, _yaml(folder / ".hydra" / "config.yaml"), _command(folder)))
    return found


def _command(folder: Path) -> list[str]:
    """The training's command: hydra saves the config's name and the overrides, but not --config-dir."""
    hydra, overrides = _yaml(folder / ".hydra" / "hydra.yaml"), _yaml(folder / ".hydra" / "overrides.yaml")
    if not isinstance(hydra, dict):
        return []
    name = hydra["hydra"]["job"]["config_name"]
    own = [str(word) for word in hydra["hydra"]["overrides"].get("hydra", [])]
    return [
        "fairseq-hydra-train",
        "--config-dir",
        "CONFIG_DIR",
        "--config-name",
        str(name),
        *map(str, overrides or []),
        *own,
    ]


def _named(config: Optional[Mapping[str, Any]], field: str) -> Optional[Path]:
    """A path in the task's settings, where it exists on this machine."""
    value = ((config or {}).get("task") or {}).get(field)
    return Path(value) if isinstance(value, str) and Path(value).exists() else None


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); make it again, or remove it to leave it out") from error


def _yaml(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML ({error}); make it again, or remove it to leave it out") from error
