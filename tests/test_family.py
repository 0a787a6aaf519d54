"""Related systems: the commands of their pages run, and students and heads have the published sizes."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from oracle import RELATED
from runs import logged, run

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.cli import labels
from skill_fairseq.models.student_init import student_shape
from skill_fairseq.modules.config import hubert_base, wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import count_parameters, widths_of
from skill_fairseq.objectives.objective import OBJECTIVES

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "examples" / "family" / "README.md").read_text(encoding="utf-8")
EVERY_COMMAND = {
    name: shlex.split(line.replace("\\\n", " "))
    for line in re.findall(r"(?m)^(fairseq-hydra-train (?:.*\\\n)*.*)$", PAGE)
    for name in re.findall(r"--config-name tiny_(\S+)", line)
}
LABELS = ("os_kdft", "multitask")
"""Systems that learn from labels, see test_family_labels.py."""
COMMANDS = {name: command for name, command in EVERY_COMMAND.items() if name not in LABELS}
MODELS = {
    "distilhubert": "distilhubert (heads 4, 8, 12: released model)",
    "deep_12l_half_l2l": "deep_vs_wide 12-L (one head)",
    "wide_3l_one_pred": "deep_vs_wide 3-L (one head)",
    "fithubert": "fithubert and fitw2v2",
    "maskhubert": "maskhubert",
    "armhubert": "armhubert",
    "starhubert": "starhubert",
    "starhubert_l": "starhubert-l",
}
GATED = {"l0_kd": ["conv", "heads", "ffn"], "lrf_kd": ["rank"]}
RECIPES = {
    **{f"{name}_hubert_base_librispeech": model for name, model in MODELS.items()},
    "fitw2v2_wav2vec2_base_librispeech": "fithubert and fitw2v2",
    "armhubert_s_hubert_base_librispeech": "armhubert-s, armwavlm-s",
    "armwavlm_s_wavlm_base_librispeech": "armhubert-s, armwavlm-s",
}
OURS = ("masked_units",)
"""Those whose papers give no sizes."""
TINY_TEACHER = REPO / "examples" / "tiny" / "teacher" / "teacher.safetensors"


def recipe(name: str) -> Any:
    """A config as written in its file, with references resolved."""
    cfg = OmegaConf.load(str(REPO / "config" / "distill" / f"{name}.yaml"))
    cfg.task.teacher, cfg.model.seed, cfg.model.pruning_units = "teacher.pt", 1, []
    return cfg


@pytest.mark.parametrize("name", RECIPES)
def test_published_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full size on the meta device."""
    if not hasattr(torch, "set_default_device"):
        monkeypatch.setattr(torch, "set_default_device", lambda device: None, raising=False)
    expected, cfg = RELATED["parameter_counts"][RECIPES[name]], recipe(name)
    teacher = wavlm_base() if "wavlm" in name else hubert_base()
    shape = student_shape(teacher, cfg.model)
    before = torch.empty(0).device
    torch.set_default_device("meta")
    try:
        encoder = SpeechEncoder(shape)
        ((field, given),) = cfg.criterion.objectives.items()
        kind = given.pop("_name")
        fields = OmegaConf.merge(OmegaConf.structured(OBJECTIVES[kind][1]), given)
        objective = OBJECTIVES[kind][0](fields, shape, [teacher], field)
    finally:
        torch.set_default_device(before)
    assert encoder.num_parameters() == expected["encoder"]
    assert (shape.encoder_layers, shape.encoder_embed_dim) == (expected["layers"], expected["width"])
    assert shape.encoder_ffn_embed_dim == expected["ffn"]
    heads = 6 * (384 + 1) * 768 if name.startswith("deep_12l_half_l2l") else expected["training_heads"]
    assert sum(p.numel() for p in objective.parameters()) == heads
    assert re.search(rf"\| `{name}` \| {expected['encoder']:,} \|", PAGE)


@pytest.mark.parametrize("name", OURS)
def test_sizes_of_our_own_shapes(name: str) -> None:
    """The page's numbers, for HuBERT Base."""
    shape = student_shape(hubert_base(), recipe(f"{name}_hubert_base_librispeech").model)
    size = count_parameters(shape, widths_of(shape))
    assert re.search(rf"\| `{name}_hubert_base_librispeech` \| {size:,} \|", PAGE)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("fit", "arm", "mask", "star"))])
def test_thin_students_have_dropout_behind_the_convolutions(name: str) -> None:
    assert recipe(name).model.dropout_input == 0.05


def test_the_page_has_a_command_for_each() -> None:
    assert list(EVERY_COMMAND) == [*MODELS, *LABELS, *GATED, *OURS]
    configs = {path.stem for path in (REPO / "config" / "distill").glob("tiny_*.yaml")}
    assert {f"tiny_{name}" for name in COMMANDS} <= configs


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *OURS])
def test_the_pages_command_makes_two_updates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is a student that loads without its teacher."""
    program, *arguments = COMMANDS[name]
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(TINY_TEACHER, teacher)
    here = [f"hydra.run.dir={tmp_path}", f"checkpoint.save_dir={tmp_path}", f"task.teacher={teacher}"]
    codebook = re.search(rf"(?m)^(skill-labels (?:.*\\\n)*.*)\n.*--config-name tiny_{name} ", PAGE)
    if codebook:
        _, *wanted = shlex.split(codebook[1].replace("\\\n", " "))
        monkeypatch.chdir(REPO)
        assert labels.main([*wanted, "--out", str(tmp_path / "units")]) == 0
        here.append(f"criterion.objectives.units.codebooks={tmp_path / 'units' / 'codebook.safetensors'}")
    few = ["optimization.max_update=2", "common.log_interval=1", "common.log_format=json", "dataset.max_tokens=96000"]
    command = [str(Path(sys.executable).with_name(program)), *arguments, *here, *few]
    log = run(command, REPO)
    entries = logged(log, "train_inner")
    assert [entry["num_updates"] for entry in entries] == [1, 2]
    assert all(entry["loss"] == entry["distillation_loss"] > 0 and entry["gnorm"] > 0 for entry in entries)
    teacher_encoder = load_encoder(teacher)
    teacher.unlink()
    checkpoint = load_torch_file(tmp_path / "checkpoint_last.pt")
    student, cfg = load_encoder(tmp_path / "checkpoint_last.pt"), recipe(f"tiny_{name}")
    assert student.config == student_shape(teacher_encoder.config, cfg.model)
    assert not [key for key in student.state_dict() if "head" in key]
    heads = {key for key in checkpoint["criterion"] or () if "heads" in key}
    assert bool(heads) != name.startswith("starhubert")
    biases = [key for key in [*heads, *checkpoint["model"]] if key.endswith("bias")]
    if student.config.layer_norm_first:  # no loss reaches the last LayerNorm
        biases.remove("speech_encoder.transformer.layer_norm.bias")
    states = checkpoint["last_optimizer_state"]
    assert len(states["biases"]["state"]) == len(biases) > 0
    assert states["biases"]["param_groups"][0]["weight_decay"] == 0.0
    assert states["default"]["param_groups"][0]["weight_decay"] == 0.01


def start(name: str, folder: Path, *overrides: str) -> Path:
    """The checkpoint of two updates by a command of the page, or by one of ``config/final`` with its name."""
    program, *arguments = COMMANDS["lrf_kd" if name == "kd" else name]
    if name == "kd":
        arguments[1:4] = ["config/final", "--config-name", "tiny_kd"]
    few = ["optimization.max_update=2", "common.log_interval=1", "common.log_format=json", "dataset.max_tokens=96000"]
    where = [f"hydra.run.dir={folder}", f"checkpoint.save_dir={folder}"]
    log = run([str(Path(sys.executable).with_name(program)), *arguments, *where, *few, *overrides], REPO)
    assert [entry["num_updates"] for entry in logged(log, "train_inner")] == [1, 2]
    assert all(entry["gnorm"] > 0 for entry in logged(log, "train_inner"))
    if name in GATED:  # kept there in every update after the warm-up of one update
        assert logged(log, "train_inner")[-1]["expected_sparsity"] == pytest.approx(0.75, abs=1e-3)
    return folder / "checkpoint_last.pt"


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
def test_the_pages_command_gates_and_stage_2_goes_on(name: str, tmp_path: Path) -> None:
    stage1 = start(name, tmp_path / "1")
    gated, teacher = load_encoder(stage1), load_encoder(TINY_TEACHER)
    assert gated.config.pruning_units == GATED[name]
    assert gated.config.original_parameters == teacher.num_parameters()
    if name == "lrf_kd":
        student = load_encoder(start("kd", tmp_path / "2", f"model.init_from={stage1}"))
        assert student.num_parameters() == pytest.approx(0.25 * teacher.num_parameters(), abs=400)
        assert len(student.config.unit_widths["rank"]) == 6 * 12 and not student.config.pruning_units


def test_one_rank_for_all_maps_is_a_quarter_of_hubert_base() -> None:
    cfg = OmegaConf.load(str(REPO / "config" / "final" / "kd_hubert_base_librispeech.yaml")).model
    cfg.unit_widths = {"rank": 85}
    shape = student_shape(hubert_base(), cfg)
    size = count_parameters(shape, widths_of(shape))
    assert "`model.unit_widths={rank:85}`" in PAGE and f"{size:,} parameters" in PAGE
    assert size == pytest.approx(0.25 * 94_370_944, rel=0.003)


@pytest.mark.slow
def test_ranks_are_learnt_together_with_ctc(small: Any, tmp_path: Path) -> None:
    """As on the page: the same command, labels beside the manifests, and one more objective."""
    folder = small.write_speech(tmp_path / "speech", {"train": [0.6, 0.7, 0.8, 0.9] * 2, "valid": [0.6, 0.7]})
    (folder / "train.ltr").write_text("x y |\ny |\n" * 4)
    (folder / "valid.ltr").write_text("x |\ny |\n")
    (folder / "dict.ltr.txt").write_text("| 8\ny 6\nx 6\n")
    (given,) = re.findall(r"`(\+task\.enable_padding=true [^`]*_name:ctc[^`]*)`", PAGE)
    further = [*given.split(), f"task.data={folder}", "task.min_sample_size=0"]
    last = start("lrf_kd", tmp_path / "run", *further)
    checkpoint = load_torch_file(last)
    assert any(key.startswith("objectives.letters.units") for key in checkpoint["criterion"])
    gated = load_encoder(last)
    assert gated.config.pruning_units == ["rank"]
    teacher = load_encoder(TINY_TEACHER).transformer.layers[-1].ffn.fc1.weight
    assert 0 < (gated.transformer.layers[-1].ffn.fc1.weight - teacher).norm() / teacher.norm() < 0.1
