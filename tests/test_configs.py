"""Every training config composes in fairseq-hydra-train, with its recipe's values."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental import compose, initialize_config_dir
from messages import says
from omegaconf import MISSING, OmegaConf

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.models.student_init import student_shape
from skill_fairseq.modules.config import hubert_large, wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import count_parameters, widths_of
from skill_fairseq.modules.units import UNITS
from skill_fairseq.pruning.lagrangian import SizeConstraint, updates_of
from skill_fairseq.pruning.reach import check_reach

CONFIG = Path(__file__).resolve().parents[1] / "config"
PATHS = {str(path.relative_to(CONFIG)): path for path in sorted(CONFIG.rglob("*.yaml"))}
RUN_CONFIGS = {name: path for name, path in PATHS.items() if name.startswith("run/")}
STUDENTS = {name: path for name, path in PATHS.items() if name.startswith("student/")}
FILES = {name: path for name, path in PATHS.items() if name not in {*RUN_CONFIGS, *STUDENTS}}
BASE = "wavlm_base_plus_librispeech"
BLOCKS = ("common", "checkpoint", "distributed_training", "task", "dataset", "criterion", "optimization", "optimizer")
BLOCKS += ("lr_scheduler", "model")


def read(name: str) -> dict[str, Any]:
    """As written in the file; numbers as omegaconf reads them (1e-08 is a number, unlike in PyYAML)."""
    return OmegaConf.to_container(OmegaConf.load(str(PATHS[name])), resolve=False)


def registered(block: str) -> dict[str, Any]:
    """The dataclasses of a block's names."""
    special = {"task": TASK_DATACLASS_REGISTRY, "model": MODEL_DATACLASS_REGISTRY}
    return special[block] if block in special else REGISTRIES[block]["dataclass_registry"]


@functools.cache
def composed(name: str, *overrides: str) -> Any:
    """A config as in a run, including hydra's own part, with open fields set to 1."""
    path = FILES[name]
    filled = [
        f"{block}.{field}=1"
        for block, fields in read(name).items()
        if isinstance(fields, dict)
        for field, value in fields.items()
        if value == MISSING and not (field == "init_from" and overrides[:1] and "student=" in overrides[0])
    ]
    hydra_init(path.stem)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(path.parent)):
        cfg = compose(path.stem, overrides=[*filled, *overrides], return_hydra_config=True)
    add_defaults(cfg)
    return cfg


def test_there_are_configs_of_every_kind() -> None:
    assert {Path(name).parent.name for name in FILES} >= {"distill", "final", "pretrain"}
    assert {"distill/tiny.yaml", "final/tiny.yaml"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_composes(name: str) -> None:
    """omegaconf raises errors on unknown keys and wrong types; interpolations resolve."""
    cfg = composed(name)
    values = {
        block: OmegaConf.to_container(fields, resolve=True, enum_to_str=True)
        for block, fields in cfg.items_ex(resolve=False)
        if block in BLOCKS
    }
    for block, fields in read(name).items():
        if block == "hydra":
            continue
        for field, value in fields.items():
            if not isinstance(value, dict) and value != MISSING and "${" not in str(value):
                assert values[block][field] == value, f"{block}.{field}"


@pytest.mark.parametrize("name", FILES)
def test_is_complete_and_in_fairseqs_order(name: str) -> None:
    text, fields = FILES[name].read_text(encoding="utf-8"), read(name)
    assert text.startswith("# @package _group_\n# ")  # its purpose is at the top
    assert tuple(fields) == ("hydra", *BLOCKS)
    assert fields["common"]["user_dir"] == "${env:SKILL_FAIRSEQ_USER_DIR,skill_fairseq}"
    for block in ("task", "criterion", "optimizer", "lr_scheduler", "model"):
        chosen = fields[block]["_name"]
        assert chosen in registered(block), f"{block}._name: {chosen}"
        keys = set(getattr(registered(block)[chosen], "__dataclass_fields__", {})) | {"_name"}
        assert set(fields[block]) <= keys
    assert set(fields) - {"hydra"} <= set(FairseqConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", FILES)
def test_run_directory_has_the_name_of_the_config_and_no_date(name: str) -> None:
    """So that the same command resumes; no two configs share one."""
    assert composed(name).hydra.run.dir == "outputs/" + name[: -len(".yaml")]


@pytest.mark.parametrize("name", FILES)
def test_an_older_checkpoint_is_kept(name: str) -> None:
    if name.startswith(("distill/", "final/")):
        assert composed(name).checkpoint.keep_interval_updates == 2


@pytest.mark.parametrize("launcher", ["basic", "submitit_slurm"])
@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_run_configs(name: str, launcher: str) -> None:
    """One task per GPU, and a port for more than one; sweeps in the run's own folder, independent of the time."""
    assert RUN_CONFIGS[name].read_text(encoding="utf-8").startswith("# @package _global_\n# ")
    fields = read(name)
    cfg = composed("distill/tiny.yaml", f"+run={Path(name).stem}", f"hydra/launcher={launcher}")
    options = cfg.hydra.launcher
    for option, value in fields["hydra"]["launcher"].items():
        assert options[option] == ("tiny" if option == "name" else value)
    assert cfg.hydra.sweep.dir == cfg.hydra.run.dir == "outputs/distill/tiny"
    assert fields["hydra"]["sweep"]["subdir"] == "${hydra.job.num}"
    assert options.additional_parameters.requeue is True and options.max_num_timeout > 0

    parallel = cfg.distributed_training
    assert parallel.distributed_world_size == options.nodes * options.tasks_per_node
    assert (parallel.distributed_port > 0) == (parallel.distributed_world_size > 1)
    assert options.gpus_per_node == (0 if name == "run/cpu.yaml" else options.tasks_per_node)
    assert not parallel.distributed_no_spawn  # fairseq sets it itself if Slurm created the processes


@pytest.mark.parametrize("name", FILES)
def test_groups_of_the_optimizer(name: str) -> None:
    """Gated students need the three groups, and one with a schedule for each separate part; others have one optimizer.
    Separate biases do not decay."""
    fields = read(name)
    gated = bool(fields["model"].get("pruning_units"))
    apart = [part for part in ("biases", "adapters", "heads") if fields["task"].get(f"separate_{part}", False)]
    assert (fields["optimizer"]["_name"] == "composite") == (gated or bool(apart))
    assert (fields["lr_scheduler"]["_name"] == "pass_through") == (gated or bool(apart))
    elastic = "elastic" in fields["criterion"]
    learned = elastic and "nested" not in fields["model"]
    assert gated == (fields["criterion"].get("target_sparsity") is not None or learned)
    if gated or apart:
        groups = fields["optimizer"]["groups"]
        assert set(groups) == {"default", *(("gates", *([] if elastic else ["multipliers"])) if gated else ()), *apart}
        for kind, group in groups.items():
            for block in ("optimizer", "lr_scheduler"):
                assert set(group[block]) <= {"_name", *registered(block)[group[block]["_name"]].__dataclass_fields__}
            decays = {"biases": 0.01 if kind == "default" else 0.0, "heads": 0.0001}  # with all their separate parts
            expected = decays["heads" if "heads" in apart else "biases"] if apart else 0.0
            assert group["optimizer"]["weight_decay"] == expected


def schedule_of(scheduler: Any) -> tuple[int, int]:
    """Updates of the warm-up and in total, as the scheduler reads its config."""
    total = scheduler.total_num_update
    return updates_of(scheduler.warmup_updates, total, "warmup_updates"), total


def test_recipe_of_dphubert() -> None:
    """arXiv:2305.17651, section 4.1: 50,000 and 25,000 updates, 160 s of audio on each of 4 GPUs."""
    for name, updates, warmup, rate in (
        ("distill/wavlm_base_plus_librispeech.yaml", 50000, 15000, 2e-4),
        ("final/wavlm_base_plus_librispeech.yaml", 25000, 5000, 1e-4),
    ):
        cfg = composed(name)
        assert cfg.optimization.max_update == updates and cfg.optimization.clip_norm == 10.0
        assert cfg.optimization.lr == [rate]
        assert cfg.distributed_training.distributed_world_size == 4
        assert cfg.dataset.max_tokens == 160 * 16000
        assert (cfg.task.min_sample_size, cfg.task.max_sample_size) == (2 * 16000, 250000)
        assert cfg.criterion.l1_weight == cfg.criterion.cos_weight == 1.0
        assert cfg.criterion.init_from == (None if "distill" in name else 1)
        assert cfg.model.encoder_layerdrop == 0.0 and cfg.model.dropout == 0.1
        groups = cfg.optimizer.groups.items() if "distill" in name else [("default", cfg)]
        for group, part in groups:
            peak = {"default": rate, "gates": 0.02, "multipliers": 0.02}[group]
            assert (part.lr_float if "distill" in name else part.optimization.lr[0]) == peak
            assert part.optimizer.adam_betas == "(0.9,0.999)" and part.optimizer.weight_decay == 0.0
            assert part.lr_scheduler._name == "linear_warmup_decay"
            assert schedule_of(part.lr_scheduler) == (warmup, updates)
    stage1 = composed("distill/wavlm_base_plus_librispeech.yaml")
    assert stage1.criterion.target_sparsity == 0.75
    assert updates_of(stage1.criterion.sparsity_warmup, stage1.criterion.max_update, "") == 5000
    assert stage1.model.pruning_units == ["conv", "heads", "ffn"] and stage1.model.init_from == 1


@pytest.mark.parametrize("name", [f"{k}/{n}.yaml" for k in ("distill", "final") for n in ("tiny", BASE)])
def test_one_knob_for_the_length_one_for_the_warm_up_one_for_the_rate(name: str) -> None:
    """Warm-ups follow the number of updates, and those of the groups each other."""
    stage1 = name.startswith("distill/")
    knob = ("optimizer.groups.default." if stage1 else "") + "lr_scheduler.warmup_updates"
    cfg = composed(name, "optimization.max_update=1000", f"{knob}=0.25", "optimization.lr=[0.007]")
    parts = list(cfg.optimizer.groups.values()) if stage1 else [cfg]
    assert [schedule_of(part.lr_scheduler) for part in parts] == [(250, 1000)] * len(parts)
    assert (parts[0].lr_float if stage1 else parts[0].lr_scheduler.lr[0]) == 0.007
    if stage1:
        share = read(name)["criterion"]["sparsity_warmup"]
        assert updates_of(cfg.criterion.sparsity_warmup, cfg.criterion.max_update, "") == round(share * 1000)
    older = composed(name, f"{knob}=7")
    assert schedule_of((older.optimizer.groups.gates if stage1 else older).lr_scheduler)[0] == 7


@pytest.mark.parametrize("recipe", ["final/tiny.yaml", "distill/tiny.yaml", f"final/{BASE}.yaml"])
@pytest.mark.parametrize("name", STUDENTS)
def test_students_go_on_top_of_any_recipe(name: str, recipe: str) -> None:
    student, fields = Path(name).stem, read(name)
    assert STUDENTS[name].read_text(encoding="utf-8").startswith("# @package _global_\n# ")
    cfg = composed(recipe, f"+student={student}", "task.teacher=given.pt")
    assert cfg.hydra.run.dir == f"outputs/student/{Path(recipe).stem}_{student.replace('tiny_', '')}"
    assert cfg.model.init_from == "given.pt" and cfg.criterion.init_from is None
    for field, value in fields["model"].items():
        assert field == "init_from" or cfg.model[field] == value
    text = (CONFIG / "README.md").read_text(encoding="utf-8")
    (size,) = re.findall(rf"^\| `\+student={student}` \| ([\d,]*) ?\|", text, re.M)
    if size:
        shape = student_shape(wavlm_base(), cfg.model)
        assert size == f"{count_parameters(shape, widths_of(shape)):,}"


def test_readme_lists_every_config_and_four_fields_that_it_has() -> None:
    text = (CONFIG / "README.md").read_text(encoding="utf-8")
    rows = {
        name: re.findall(r"`([a-z0-9_.]+)`", last)
        for name, last in re.findall(r"^\| `(\S+)` \|.*\| (.*) \|$", text, re.M)
    }
    rows = {name: fields for name, fields in rows.items() if "*" not in name and "+" not in name}
    assert {f"{name}.yaml" for name in rows} == set(FILES)
    for name, fields in rows.items():
        assert len(fields) == 4
        for block, field in (dotted.split(".") for dotted in fields):
            assert field in read(f"{name}.yaml")[block], f"{name}: {block}.{field}"


@pytest.mark.parametrize("name", FILES)
def test_precision_and_batch_multiple_stand_in_every_config(name: str) -> None:
    fields = read(name)
    assert {"fp16", "bf16"} & set(fields["common"])
    assert "required_batch_size_multiple" in fields["dataset"]
    if name.startswith(("distill/", "final/")):
        assert fields["task"]["tf32"] is True
    if name.startswith("distill/"):  # so that common.bf16=true is enough
        assert fields["common"]["fp16_no_flatten_grads"] is True


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("pretrain/")])
def test_validation_goes_by_updates_and_comes_once(name: str) -> None:
    dataset = read(name)["dataset"]
    assert dataset["validate_interval"] == 1000 and dataset["validate_interval_updates"] > 0


@pytest.mark.parametrize("kind", ["distill", "final"])
@pytest.mark.parametrize("teacher", ["hubert_base", "hubert_large", "wavlm_large"])
def test_other_teachers_have_the_same_recipe(kind: str, teacher: str) -> None:
    """Except for the expected waveforms, and smaller batches, of which larger models use two per update."""
    base, other = (read(f"{kind}/{name}_librispeech.yaml") for name in ("wavlm_base_plus", teacher))
    large = teacher.endswith("large")
    for config in (base, other):
        del config["hydra"]
    base["task"]["normalize"] = large
    if large:
        base["dataset"].update(max_tokens=1280000, max_tokens_valid=1280000)
        base["optimization"]["update_freq"] = [2]
    assert other == base


def test_baseline_is_dphubert_and_nothing_else() -> None:
    """Layers 0, 4, 8 and 12, a shared projection for the last three, FFN gates half closed; otherwise the same run."""
    ours, baseline = (read(f"distill/{name}wavlm_base_plus_librispeech.yaml") for name in ("", "dphubert_"))
    expected = copy.deepcopy(ours)
    expected["criterion"]["groups"] = [[0], [4], [8], [12]]
    for config in (baseline, expected):
        config["criterion"].pop("groups_file", None)  # null equals leaving it out
        config.pop("hydra")
    expected["criterion"]["projection_sharing"] = [0, 1, 1, 1]
    expected["model"]["ffn_drop_rate"] = 0.5
    assert baseline == expected


GATED = [f for f in FILES if read(f)["model"].get("pruning_units") and "elastic" not in read(f)["criterion"]]
"""Whose gates travel to one target; those of elastic runs are shifted there."""


@pytest.mark.parametrize("name", GATED)
def test_gates_can_get_to_the_target_of_every_stage_1_config(name: str) -> None:
    cfg = composed(name)
    tiny = CONFIG.parent / "examples" / "tiny" / "teacher" / "teacher.safetensors"
    shape = load_encoder(tiny).config if "tiny" in name else wavlm_base()
    if "large" in name:  # the real one takes gigabytes
        small = {"encoder_layers": 2, "encoder_embed_dim": 64, "encoder_ffn_embed_dim": 256}
        shape = hubert_large(encoder_attention_heads=4, **small)
    encoder = SpeechEncoder(shape.replace(pruning_units=list(cfg.model.pruning_units)))
    for _, gate in encoder.named_gates():
        rate = cfg.model[UNITS[gate.unit].drop_rate]
        gate.log_alpha.data.fill_(math.log((1 - rate) / rate))
    warmup = updates_of(cfg.criterion.sparsity_warmup, cfg.optimization.max_update, "")
    criterion = SimpleNamespace(constraint=SizeConstraint(cfg.criterion.target_sparsity, warmup))
    assert check_reach(cfg, encoder, criterion) == []
    short = copy.deepcopy(cfg)
    short.optimization.max_update = cfg.optimization.max_update // 100  # the schedule follows; the target does not here
    warnings = check_reach(short, encoder, criterion)
    assert [warning.split(":")[0] for warning in warnings][-1] == "criterion.sparsity_warmup"
    if "tiny" in name:  # for Base the gates' rate is high enough anyway
        assert len(warnings) == 2 and re.search(says("criterion.target_sparsity: 0.75", "cannot"), warnings[0])
