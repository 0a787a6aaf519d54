"""Makes a student of a related system, with its own recipe and the budget's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# beside this file
from budget import TOLERANCE, Plan, cost_of, plan
from grid import Grid, Run, gate_overrides, recipe_overrides, then_overrides
from student import GATED, common_overrides, in_log, train

from skill_fairseq import load_encoder
from skill_fairseq.checkpoints.export import save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli import export, shrink
from skill_fairseq.models.student_init import layers_of, make_student, parts_of, student_shape
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import Cost, make_cost
from skill_fairseq.pruning.magnitude import prune_by_magnitude
from skill_fairseq.pruning.selection import check_reachable


def plan_of(recipe: Mapping[str, Any], teacher: EncoderConfig, sparsity: float, cost: Cost) -> Plan | None:
    """How a recipe's student reaches the budget; None if gates do it.

    Args:
        recipe: its config.
        teacher: shape.
        sparsity: fraction of the teacher's cost to remove.
        cost: parameters or MACs.

    Raises:
        ValueError: the budget cannot be reached.
    """
    model = SimpleNamespace(**recipe["model"])
    shape = student_shape(teacher, model)
    if model.pruning_units:
        check_reachable(shape.replace(pruning_units=model.pruning_units), sparsity, "sparsity", cost)
        return None
    target = (1 - sparsity) * cost.original(teacher)
    return plan(shape, parts_of(model), layers_of(model, teacher), teacher.encoder_layers, target, cost)


def why_unreachable(runs: Sequence[Run], grid: Grid, configs: Mapping[str, Any]) -> dict[str, str]:
    """Name of a run -> why its student cannot have the requested size, for such runs only."""
    teacher, cost = load_encoder(grid.teacher).config, make_cost(grid.budget)
    found: dict[tuple[str, float], str | None] = {}
    for run in runs:
        key = (run.method, run.sparsity)
        if key in found:
            continue
        found[key] = None
        try:
            if run.target.recipe:
                plan_of(configs["recipes"][run.method], teacher, run.sparsity, cost)
            else:
                check_reachable(teacher.replace(pruning_units=GATED), run.sparsity, "sparsity", cost)
        except ValueError as error:
            found[key] = str(error)
    whys = {run.name: found[run.method, run.sparsity] for run in runs}
    return {name: why for name, why in whys.items() if why is not None}


def initial_student(
    recipe: Mapping[str, Any], teacher: SpeechEncoder, sparsity: float, cost: Cost, seed: int
) -> SpeechEncoder | None:
    """The initial student of a recipe, of the budget's size; None if gates reach it.

    Raises:
        ValueError: no such student can be made.
    """
    found = plan_of(recipe, teacher.config, sparsity, cost)
    if found is None:
        return None
    fields = {**recipe["model"], **found.shape.to_dict(), "pruning_units": [], "seed": seed}
    fields.update(init_parts=list(found.parts), init_layers=found.layers and list(found.layers))
    if found.layers is not None:
        del fields["encoder_layers"]
    for name in ("conv_channels", "heads", "ffn_dims", "original_parameters"):
        fields.pop(name, None)
    student = make_student(teacher, SimpleNamespace(**fields))
    target = (1 - sparsity) * cost.original(teacher.config)
    if found.cut:
        student = prune_by_magnitude(student, 1 - target / cost.original(student.config), list(found.cut), cost)
    size = cost_of(student.config, cost)
    if abs(size - target) > TOLERANCE * target:
        raise ValueError(f"a student of {size:,.0f} {cost}, expected {target:,.0f} within {TOLERANCE:.0%}")
    return student


def make_by_recipe(run: Run, grid: Grid, folder: Path, configs: Path, composed: Mapping[str, Any]) -> dict[str, Any]:
    """Makes student.safetensors of a related system: trains a student of the budget's size with its recipe, and the
    second stage if there is one."""
    student, start, log = folder / "student.safetensors", folder / "initial.safetensors", folder / "log"
    teacher, cost, recipe = load_encoder(grid.teacher), make_cost(grid.budget), composed["recipes"][run.method]
    overrides = [*recipe_overrides(composed, one_of_two=run.target.then is not None)]
    overrides += [*common_overrides(run, grid, teacher), *run.target.stage1]
    if not start.is_file():
        made = initial_student(recipe, teacher, run.sparsity, cost, run.seed)
        if made is not None:
            save_encoder(made, start, {"method": run.method, "source": grid.teacher.name})
    if start.is_file():  # the shape comes from the file, which was made from the recipe's
        own = {"init_parts", "init_layers", *(f.name for f in dataclasses.fields(EncoderConfig))} - {"pruning_units"}
        said = [name for name, value in recipe["model"].items() if name in own and value is not None]
        overrides += [f"model.init_from={start}", *(f"model.{name}=null" for name in said)]
    else:
        gates = gate_overrides(grid.overrides("stage1"))
        overrides += [*gates, f"criterion.target_sparsity={run.sparsity}"]
    spent = {"stage1": train(folder / "stage1", configs / str(run.target.recipe), overrides)}
    checkpoint = folder / "stage1" / "checkpoint_last.pt"
    if run.target.then:
        again = [*then_overrides(composed), *common_overrides(run, grid, teacher), "task.teacher=null"]
        again += [f"model.init_from={checkpoint}", *run.target.stage2]
        spent["stage2"] = train(folder / "stage2", configs / run.target.then, again)
        checkpoint = folder / "stage2" / "checkpoint_last.pt"
    if not student.is_file():
        in_log((export if start.is_file() else shrink).main, [str(checkpoint), str(student)], log)
    actual = 1 - cost_of(load_encoder(student).config, cost) / cost.original(teacher.config)
    expected = None if start.is_file() else read_source(student).provenance["sparsity"]["expected"]
    return {
        "sparsity": {"asked": run.sparsity, "expected": expected, "actual": actual},
        "seconds": {stage: of["seconds"] for stage, of in spent.items()},
        "cpu_seconds": sum(of["cpu_seconds"] for of in spent.values()),
        "attempts": {stage: of["attempts"] for stage, of in spent.items()},
    }
