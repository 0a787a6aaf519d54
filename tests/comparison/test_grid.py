"""Reading grids, and the runs that they define."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from grid import (
    STAGES,
    Run,
    changed_setting,
    composed,
    extended,
    gate_overrides,
    owner,
    read_grid,
    recipe_overrides,
    runs_of,
    settings_of,
)
from messages import says
from methods import Target
from student import filled

from skill_fairseq.clustering.similarity import MEASURES

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "benchmark" / "grid.yaml"
STAGE = {"config": "distill/tiny", "overrides": ["a=1"]}
FIELDS: dict[str, Any] = {
    "teacher": "teacher.pt",
    "data": "data",
    "tasks": ["tasks/digit"],
    "cluster": [],
    "stage1": STAGE,
    "stage2": STAGE,
    "methods": ["skill", "dphubert", "single_layers", "skill_l1", "no_distillation"],
    "variants": {"skill_l1": {"clustering": {"measure": "l1"}}, "half": {"stage1": ["model.ffn_drop_rate=0.5"]}},
    "sparsities": [0.5, 0.75],
    "seeds": [1, 2],
}
CLUSTERS = {
    "groups": [[0], [1], [2], [3]],  # equal to skill_l1 and single_layers
    "layers": [0, 1, 2, 3],
    "matrices": {"l1": [[float(abs(i - j)) for j in range(4)] for i in range(4)]},
    "measure": "l1",
    "settings": {"linkage": "average", "neighbours_only": False},
}


def written(folder: Path, **grids: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grids))
    return path


def test_paths_are_relative_to_the_file_and_changes_come_last(tmp_path: Path) -> None:
    grid = read_grid(written(tmp_path, one=FIELDS), "one", seeds=[7], methods=None, teacher="/else/where.pt")
    assert (grid.data, grid.teacher) == (tmp_path / "data", Path("/else/where.pt"))
    assert grid.tasks == [tmp_path / "tasks" / "digit"] and grid.baseline == "dphubert"
    assert grid.seeds == [7] and grid.methods == FIELDS["methods"]


def test_a_grid_takes_over_the_fields_of_its_base(tmp_path: Path) -> None:
    path = written(tmp_path, one=FIELDS, two={"base": "one", "seeds": [3]}, three={"base": "two", "sparsities": [0.9]})
    grid = read_grid(path, "three")
    assert (grid.seeds, grid.sparsities, grid.methods) == ([3], [0.9], FIELDS["methods"])


def test_updates_set_length_and_warm_up(tmp_path: Path) -> None:
    path = written(tmp_path, one=FIELDS, two={"base": "one", "updates": {"stage1": 200, "stage2": 100}})
    assert read_grid(path, "one").overrides("stage1") == ["a=1"]
    grid = read_grid(path, "two")
    assert grid.overrides("stage1")[1:] == [
        "optimization.max_update=200",
        "optimizer.groups.default.lr_scheduler.warmup_updates=20",
    ]
    assert grid.overrides("stage2")[1:] == ["optimization.max_update=100", "lr_scheduler.warmup_updates=10"]


def test_every_shipped_grid_reads_and_its_files_are_there() -> None:
    for name in yaml.safe_load(SHIPPED.read_text()):
        grid = read_grid(SHIPPED, name)
        config = SHIPPED.parents[2] / "config"
        assert grid.teacher.is_file() and (grid.data / "valid.tsv").is_file()
        assert all((task / "test.tsv").is_file() for task in grid.tasks)
        assert all((config / f"{stage['config']}.yaml").is_file() for stage in (grid.stage1, grid.stage2))
    full = read_grid(SHIPPED, "full")
    tried = {full.variants[name]["clustering"]["measure"] for name in full.methods if name.startswith("skill_")}
    assert tried == set(MEASURES) - {"cka_minibatch"}
    choices = read_grid(SHIPPED, "choices")
    assert set(choices.variants) < set(choices.methods) and choices.baseline == "skill"
    assert sorted(full.sparsities) == [0.5, 0.75, 0.875] and full.seeds == [1, 2, 3]


def test_runs_go_seed_by_seed_and_the_untrained_ones_once(tmp_path: Path) -> None:
    runs = runs_of(read_grid(written(tmp_path, one=FIELDS), "one"), CLUSTERS)
    assert [run.name for run in runs[:5]] == [f"{method}-0.5-1" for method in FIELDS["methods"]]
    assert len(runs) == 2 * (5 + 4) and len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs if run.method == "no_distillation"] == [1, 1]


def test_equal_targets_share_one_run(tmp_path: Path) -> None:
    runs = runs_of(read_grid(written(tmp_path, one=FIELDS), "one"), CLUSTERS)
    owners = {run.name: owner(run, runs).name for run in runs}
    assert owners["skill_l1-0.75-2"] == owners["single_layers-0.75-2"] == "skill-0.75-2"
    assert owners["dphubert-0.75-2"] == "dphubert-0.75-2"  # the same layers, but a shared projection
    runs = runs_of(read_grid(written(tmp_path, one=FIELDS), "one", methods=["dphubert", "skill", "half"]), CLUSTERS)
    assert owner(runs[2], runs).name == "half-0.5-1"  # the same groups, but other gates


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"methods": ["skill", "x"]}, ["methods", "'x'"]),
        ({"methods": ["skill"]}, ["baseline", "'dphubert'", "methods"]),
        ({"sparsities": [75]}, ["sparsities", 75, "between 0 and 1"]),
        ({"seeds": [0]}, ["seeds", 0, "integers from 1"]),
        ({"seeds": []}, ["seeds", "[]", "list"]),
        ({"seeds": [1, 1]}, ["seeds", "[1, 1]", "twice"]),
        ({"stage1": {"config": "x"}}, ["stage1", "{'config': 'x'}", "overrides"]),
        ({"updates": {"stage1": 5}}, ["updates", "{'stage1': 5}", "stage2"]),
        ({"variants": ["a"]}, ["variants", "['a']", "mapping"]),
        ({"sparsity": 0.5}, ["unknown", "['sparsity']"]),
        ({"base": "none"}, ["base", "'none'"]),
    ],
)
def test_bad_grids_are_refused_by_field(tmp_path: Path, changes: dict[str, Any], said: list) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        read_grid(written(tmp_path, one={**FIELDS, **changes}), "one")


def test_missing_files_and_grids_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=says(tmp_path / "none.yaml", "grid")):
        read_grid(tmp_path / "none.yaml", "one")
    with pytest.raises(ValueError, match=says("grid", "'two'", "one")):
        read_grid(written(tmp_path, one=FIELDS), "two")


def test_tasks_of_the_same_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says("tasks", "same name", "['digit', 'digit']")):
        read_grid(written(tmp_path, one={**FIELDS, "tasks": ["a/digit", "b/digit"]}), "one")


SHIPPED_OVERRIDES = ["dataset.disable_validation=true"]


def settings(hashes: dict[str, Any], package: str = "1.0", stage1: Any = None) -> dict[str, Any]:
    """Compared like the command does, from JSON."""
    grid = read_grid(SHIPPED, "trial")
    configs = {"stage1": stage1 or {"model": {"ffn": 0.5}}, "stage2": {"model": {"ffn": 0.5}}}
    return json.loads(json.dumps(settings_of(grid, hashes, configs, {"skill_fairseq": package})))


def test_another_recipe_is_named_by_what_differs() -> None:
    hashes = {"teacher": "t", "data": {"train.tsv": "a"}, "tasks": {"digit": {"train.labels.tsv": "b"}}}
    before = settings(hashes)
    assert changed_setting(before, settings(hashes)) is None
    assert changed_setting(before, settings(hashes, "1.1")) == ("package.skill_fairseq", "1.0", "1.1")
    labels = {**hashes, "tasks": {"digit": {"train.labels.tsv": "c"}}}
    assert changed_setting(before, settings(labels)) == ("tasks.digit.train.labels.tsv", "b", "c")
    more = {**hashes, "data": {"train.tsv": "a", "valid.tsv": "v"}}
    assert changed_setting(before, settings(more)) == ("data.valid.tsv", None, "v")
    assert changed_setting(settings(more), before) == ("data.valid.tsv", "v", None)
    gates = settings(hashes, stage1={"model": {"ffn": 0.01}})
    assert changed_setting(before, gates) == ("stage1.model.ffn", 0.5, 0.01)


def test_tasks_and_recipes_may_be_added_but_not_changed() -> None:
    before = {**settings({"teacher": "t", "tasks": {"digit": {"a.tsv": "1"}}})}
    more = {**settings({"teacher": "t", "tasks": {"letters": {"a.tsv": "2"}}}), "recipes": {"x": {"lr": 1}}}
    assert changed_setting(extended(before, more), extended(more, before)) is None
    assert extended(more, before)["tasks"] == {"digit": {"a.tsv": "1"}, "letters": {"a.tsv": "2"}}
    again = {**more, "recipes": {"x": {"lr": 2}}}
    assert changed_setting(extended(more, again), extended(again, more)) == ("recipes.x.lr", 1, 2)


@pytest.mark.nightly
def test_recipes_see_what_both_stages_see() -> None:
    grid = read_grid(SHIPPED, "family")
    config = SHIPPED.parents[2] / "config"
    stages = {stage: composed(config, getattr(grid, stage)["config"], grid.overrides(stage)) for stage in STAGES}
    equal = recipe_overrides(stages)
    assert "optimization.max_update=300" in equal and "dataset.max_tokens=192000" in equal
    for recipe in grid.recipes.values():
        found = composed(config, recipe.config, [*equal, *recipe.overrides])
        for name in ("max_sample_size", "min_sample_size", "crop_multiple"):
            assert found["task"][name] == stages["stage1"]["task"][name]
        assert found["dataset"]["batch_size"] == stages["stage1"]["dataset"]["batch_size"]
        lr = composed(config, recipe.config, [])["optimization"]["lr"]
        assert found["optimization"]["lr"] == lr and found["dataset"]["disable_validation"] is True


def test_gated_recipes_take_over_how_gates_move() -> None:
    words = [
        "dataset.x=1",
        "criterion.sparsity_warmup=100",
        "optimizer.groups.gates.lr_float=0.1",
        "criterion.cost=macs",
    ]
    assert gate_overrides([*words, "optimizer.groups.default.lr_float=1"]) == words[1:]


def test_overrides_may_name_what_a_run_leaves(tmp_path: Path) -> None:
    """And the comparison's folder; other words with a $ stay, which OmegaConf reads."""
    overrides = ("+criterion.target={latency: $left, table: $out/latency.json}", "task.data=${task.teacher}")
    run = Run("by_time", 0.9, 1, Target([[0]], "all", stage1=overrides))
    folder = tmp_path / "out" / "runs" / run.name
    asked, same = filled(run, folder)
    assert asked == f"+criterion.target={{latency: 0.1, table: {tmp_path}/out/latency.json}}"
    assert same == overrides[1]


def test_budgets_are_parameters_or_macs(tmp_path: Path) -> None:
    path = written(tmp_path, one={**FIELDS, "budget": "macs"}, two={**FIELDS, "budget": "watts"})
    assert read_grid(path, "one").overrides("stage1") == ["a=1", "criterion.cost=macs"]
    assert read_grid(path, "one").overrides("stage2") == ["a=1"]
    with pytest.raises(ValueError, match=says("budget", "'watts'", "macs")):
        read_grid(path, "two")


@pytest.mark.parametrize("name", ["family_macs", "cost"])
def test_a_size_of_another_cost_composes(name: str) -> None:
    """With every override of its variants and its recipes."""
    grid, config = read_grid(SHIPPED, name), SHIPPED.parents[2] / "config"
    costs = set()
    for variant in grid.variants.values():
        more = ["criterion.target_sparsity=0.75", *variant.get("stage1", [])]
        found = composed(config, grid.stage1["config"], [*grid.overrides("stage1"), *more])
        costs.add("target" if found["criterion"].get("target") else found["criterion"]["cost"])
    assert costs == ({"macs"} if name == "family_macs" else {"parameters", "macs", "target"})
    for recipe in grid.recipes.values():
        if "l0_kd" in recipe.config or "lrf_kd" in recipe.config:
            moves = gate_overrides(grid.overrides("stage1"))
            assert composed(config, recipe.config, [*moves, *recipe.overrides])["criterion"]["cost"] == "macs"


def test_a_config_is_composed_with_overrides_and_what_it_leaves_to_defaults(tmp_path: Path) -> None:
    """A changed file, override or default gives another recipe."""
    shutil.copytree(SHIPPED.parents[2] / "config" / "distill", tmp_path / "distill")
    before = composed(tmp_path, "distill/tiny", SHIPPED_OVERRIDES)
    assert before["dataset"]["disable_validation"] is True and before["optimization"]["max_update"] == 400
    assert before["optimization"]["sentence_avg"] is False and before["model"]["ffn_drop_rate"] == 0.01
    assert str(tmp_path) not in json.dumps(before)
    changed = composed(tmp_path, "distill/tiny", [*SHIPPED_OVERRIDES, "optimization.max_update=7"])
    assert changed_setting(before, changed) == ("optimization.max_update", 400, 7)
    file = tmp_path / "distill" / "tiny.yaml"
    file.write_text(file.read_text().replace("clip_norm: 10.0", "clip_norm: 5.0"))
    found = composed(tmp_path, "distill/tiny", SHIPPED_OVERRIDES)
    assert changed_setting(before, found) == ("optimization.clip_norm", 10.0, 5.0)
    with pytest.raises(ValueError, match=says("distill/tiny.yaml", "no.such=1")):
        composed(tmp_path, "distill/tiny", ["no.such=1"])
