"""Related systems: their pages' commands run, and their students and heads have the published sizes."""

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
from skill_fairseq.models.student_init import student_shape
from skill_fairseq.modules.config import hubert_base, wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.objectives.objective import OBJECTIVES

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "examples" / "family" / "README.md").read_text(encoding="utf-8")
EVERY_COMMAND = {
    name: shlex.split(line.replace("\\\n", " "))
    for line in re.findall(r"(?m)^    (fairseq-hydra-train (?:.*\\\n)*.*)$", PAGE)
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
RECIPES = {
    **{f"{name}_hubert_base_librispeech": model for name, model in MODELS.items()},
    "fitw2v2_wav2vec2_base_librispeech": "fithubert and fitw2v2",
    "armhubert_s_hubert_base_librispeech": "armhubert-s, armwavlm-s",
    "armwavlm_s_wavlm_base_librispeech": "armhubert-s, armwavlm-s",
}
TINY_TEACHER = REPO / "examples" / "tiny" / "teacher" / "teacher.safetensors"


def recipe(name: str) -> Any:
    """A config as it stands in its file, what it refers to filled in."""
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


def test_the_page_has_a_command_for_each() -> None:
    assert list(EVERY_COMMAND) == [*MODELS, *LABELS]
    configs = {path.stem for path in (REPO / "config" / "distill").glob("tiny_*.yaml")}
    assert {f"tiny_{name}" for name in COMMANDS} <= configs


@pytest.mark.parametrize("name", COMMANDS)
def test_the_pages_command_makes_two_updates(name: str, tmp_path: Path) -> None:
    """And the checkpoint is a student, whose teacher is gone."""
    program, *arguments = COMMANDS[name]
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(TINY_TEACHER, teacher)
    here = [f"hydra.run.dir={tmp_path}", f"checkpoint.save_dir={tmp_path}", f"task.teacher={teacher}"]
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
