"""The grid of a comparison: methods, sparsities, seeds, and training settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml
from methods import Recipe, Target, Variant, check_methods, read_methods, target_of  # beside this file

from skill_fairseq.files import PathLike
from skill_fairseq.pruning.costs import COSTS
from skill_fairseq.reading import read_text

STAGES = ("stage1", "stage2")
UNTRAINED = ("no_distillation",)
"""Methods that do not depend on the seed: they run once per sparsity."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Everything that a comparison's numbers depend on, except the content of teacher and recordings.

    Attributes:
        teacher: file or folder of the teacher.
        data: folder with train.tsv and valid.tsv.
        tasks: folders of probe tasks.
        cluster: options of skill-cluster besides teacher, manifest and out.
        stage1, stage2: config (folder/name below config/) and overrides of each stage.
        updates: replaces the configs' numbers of updates, for stage1 and stage2; their warm-up becomes a tenth.
        methods, sparsities, seeds: the grid itself.
        baseline: the method that the others are compared with.
        variants: the grid's own methods, by name: see :data:`methods.Variant`.
        budget: the cost that sparsities refer to, "parameters" or "macs".
        recipes: related systems among the file's methods, see :func:`methods.read_methods`.
    """

    teacher: Path
    data: Path
    tasks: list[Path]
    cluster: list[str]
    stage1: dict[str, Any]
    stage2: dict[str, Any]
    methods: list[str]
    sparsities: list[float]
    seeds: list[int]
    baseline: str = "dphubert"
    updates: Optional[dict[str, int]] = None
    variants: dict[str, Variant] = dataclasses.field(default_factory=dict)
    budget: str = "parameters"
    recipes: dict[str, Recipe] = dataclasses.field(default_factory=dict)

    def overrides(self, stage: str) -> list[str]:
        """Overrides of "stage1" or "stage2", for fairseq-hydra-train."""
        found = list(getattr(self, stage)["overrides"])
        if self.updates:
            updates = self.updates[stage]
            warmup = f"lr_scheduler.warmup_updates={updates // 10}"
            found += [f"optimization.max_update={updates}"]
            found += [f"optimizer.groups.default.{warmup}" if stage == "stage1" else warmup]
        if self.budget != "parameters" and stage == "stage1":
            found.append(f"criterion.cost={self.budget}")
        return found


@dataclasses.dataclass(frozen=True)
class Run:
    """One student to make and measure."""

    method: str
    sparsity: float
    seed: int
    target: Target

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.method}-{self.sparsity:g}-{self.seed}"


def read_grid(path: PathLike, name: str, **changes: Any) -> Grid:
    """Reads a grid from a YAML file.

    Args:
        path: the file: a mapping from names to grids; ``base: other`` copies the other's fields first.
        name: the grid's name.
        changes: fields that replace the file's; None keeps the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such grid, unknown, missing or unusable fields; names file, grid and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such grid file; copy examples/benchmark/grid.yaml")
    grids = yaml.safe_load(read_text(path))
    if not isinstance(grids, dict) or not isinstance(grids.get(name), dict):
        known = ", ".join(grids) if isinstance(grids, dict) else "none"
        raise ValueError(f"{path}: has no grid {name!r}, but {known}; choose one of these or add it")
    where = f"{path}, grid {name}"
    fields = dict(grids[name])
    for _ in grids:
        if "base" in fields:
            base = fields.pop("base")
            if not isinstance(grids.get(base), dict):
                raise ValueError(
                    f"{where}: base {base!r} is not a grid of the file; expected one of {', '.join(grids)}"
                )
            fields = {**grids[base], **fields}
    fields["methods"], recipes = read_methods(fields.get("methods"), where)
    fields.update({key: value for key, value in changes.items() if value is not None})
    wanted = {field.name for field in dataclasses.fields(Grid)} - {"recipes"}
    fields = {key: value for key, value in fields.items() if key != "methods" or value is not None}
    required = wanted - {"baseline", "updates", "variants", "budget"}
    if set(fields) - wanted or required - set(fields):
        raise ValueError(
            f"{where}: unknown fields {sorted(set(fields) - wanted)}, missing fields {sorted(required - set(fields))}; "
            f"expected {', '.join(sorted(wanted))}"
        )
    for key in ("teacher", "data"):
        fields[key] = (path.parent / fields[key]).resolve()
    fields["tasks"] = [(path.parent / task).resolve() for task in fields["tasks"]]
    grid = Grid(**fields, recipes=recipes)
    _check(grid, where)
    return grid


def _check(grid: Grid, where: str) -> None:
    for name in ("methods", "sparsities", "seeds", "tasks"):
        values = getattr(grid, name)
        if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
            raise ValueError(f"{where}: {name} is {values!r}; expected a list of at least one, none twice")
    if not isinstance(grid.variants, dict):
        raise ValueError(f"{where}: variants is {grid.variants!r}; expected a mapping from names to variants")
    names = [task.name for task in grid.tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: tasks has folders of the same name, {names}; rename one: results go by name")
    check_methods(grid.methods, grid.variants, grid.recipes)
    if grid.budget not in COSTS:
        raise ValueError(f"{where}: budget is {grid.budget!r}; expected one of {', '.join(COSTS)}")
    if grid.baseline not in grid.methods:
        raise ValueError(f"{where}: baseline {grid.baseline!r} is not among the methods; add it there")
    for value in grid.sparsities:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"{where}: sparsities has {value!r}; expected numbers between 0 and 1, such as 0.75")
    for value in grid.seeds:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: seeds has {value!r}; expected integers from 1 on")
    for name in STAGES:
        stage = getattr(grid, name)
        if not isinstance(stage, dict) or set(stage) != {"config", "overrides"}:
            raise ValueError(f"{where}: {name} is {stage!r}; expected the fields config and overrides")
    if grid.updates is not None and (
        not isinstance(grid.updates, dict)
        or set(grid.updates) != {"stage1", "stage2"}
        or not all(isinstance(n, int) and n > 1 for n in grid.updates.values())
    ):
        raise ValueError(f"{where}: updates is {grid.updates!r}; expected stage1 and stage2, numbers above 1")


def runs_of(grid: Grid, clusters: Mapping[str, Any]) -> list[Run]:
    """All runs, by seed, so that a comparison stopped early has all methods.

    Two methods with the same groups and projections share the run of the first: see :func:`owner`.
    """
    runs = []
    for seed in grid.seeds:
        for sparsity in grid.sparsities:
            for method in grid.methods:
                if method in UNTRAINED and seed != grid.seeds[0]:
                    continue
                runs.append(
                    Run(method, float(sparsity), seed, target_of(method, clusters, seed, grid.variants, grid.recipes))
                )
    return runs


def owner(run: Run, runs: Sequence[Run]) -> Run:
    """The first run with the same student as this one: itself, or another method's."""
    return next(o for o in runs if (o.sparsity, o.seed, o.target) == (run.sparsity, run.seed, run.target))


def composed(folder: Path, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A training config as fairseq-hydra-train composes it, with overrides and defaults.

    Args:
        folder: the folder that ``config`` is relative to.
        config: YAML file without its suffix.
        overrides: overrides of fairseq-hydra-train.

    Raises:
        ValueError: hydra cannot compose it; names the config.
    """
    from fairseq.dataclass.initialize import add_defaults, hydra_init
    from hydra.errors import HydraException
    from hydra.experimental import compose, initialize_config_dir
    from omegaconf import OmegaConf

    path = (folder / config).resolve()
    hydra_init(path.name)
    try:
        with initialize_config_dir(str(path.parent)):
            found = compose(path.name, list(overrides))
    except HydraException as error:
        raise ValueError(
            f"{path}.yaml with {' '.join(overrides)}: {error}; correct the grid's config or overrides"
        ) from error
    add_defaults(found)
    plain = json.dumps(OmegaConf.to_container(found, resolve=False), default=str)  # fairseq's enumerations are not JSON
    return dict(json.loads(plain))


EQUAL = ("dataset.max_tokens", "dataset.batch_size", "optimization.update_freq")
EQUAL += tuple(f"task.{name}" for name in ("max_sample_size", "min_sample_size", "crop_multiple"))
"""Fields that give recipes the audio of stage 1."""


def recipe_overrides(configs: Mapping[str, Any], one_of_two: bool = False) -> list[str]:
    """Overrides that give a recipe as much data as both stages: their updates, each with the audio of stage 1.

    Args:
        configs: configs of both stages, from :func:`composed`.
        one_of_two: the recipe has a second stage, which gets the updates of stage 2, while it gets those of stage 1.
    """
    updates = sum(configs[stage]["optimization"]["max_update"] for stage in (STAGES[:1] if one_of_two else STAGES))
    found = [f"optimization.max_update={updates}", "dataset.disable_validation=true"]
    for name in EQUAL:
        section, _, field = name.partition(".")
        value = configs["stage1"][section][field]
        found.append(f"{name}={'null' if value is None else json.dumps(value).replace(' ', '')}")
    return found


def then_overrides(configs: Mapping[str, Any]) -> list[str]:
    """The same for a recipe's second stage, whose utterances are padded, not cropped: updates and samples per batch."""
    most, updates = configs["stage1"]["dataset"]["max_tokens"], configs["stage2"]["optimization"]["max_update"]
    return [f"optimization.max_update={updates}", "dataset.disable_validation=true", f"dataset.max_tokens={most}"]


def gate_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides that make gates reach their sparsity in few updates, which gated recipes share."""
    prefixes = ("criterion.sparsity_warmup", "optimizer.groups.gates.", "optimizer.groups.multipliers.")
    return [word for word in overrides if word.startswith((*prefixes, "criterion.cost="))]


def settings_of(
    grid: Grid, hashes: Mapping[str, Any], configs: Mapping[str, Any], package: Mapping[str, str]
) -> dict[str, Any]:
    """The settings that must not change in a folder of results; the grid's own lists may grow.

    Args:
        grid: the comparison.
        hashes: ``teacher``, ``data`` and ``tasks``: SHA-256 of the teacher and of each file that is read, by name.
        configs: the full training config of each stage and recipe, except for the differences between runs.
        package: name -> version of the training packages.
    """
    return {**hashes, "cluster": grid.cluster, **configs, "package": dict(package)}


MAY_GROW = ("tasks", "recipes")


def extended(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, plus tasks and recipes that only the others have, as these may be added at any time."""
    return {**settings, **{name: {**others.get(name, {}), **settings.get(name, {})} for name in MAY_GROW}}


def changed_setting(before: Any, now: Any, name: str = "") -> Optional[tuple[str, Any, Any]]:
    """The first setting that differs: its dotted name, its old and new value (None: missing)."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return None if before == now else (name, before, now)
    for key in dict.fromkeys([*now, *before]):
        found = changed_setting(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        if found:
            return found
    return None
