"""OS-KDFT and the multi-task student: sizes, the page's commands, resuming, and two processes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from oracle import RELATED
from runs import logged, run, script

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.labels.targets import Target
from skill_fairseq.models.student_init import student_shape
from skill_fairseq.modules.config import hubert_base, hubert_large, wavlm_base
from skill_fairseq.modules.size import count_parameters, widths_of
from skill_fairseq.objectives.objective import OBJECTIVES
from tests.test_family import EVERY_COMMAND, PAGE, REPO, TINY_TEACHER, recipe

SPEAKERS = ["fsdd-george", "fsdd-jackson", "fsdd-lucas", "fsdd-nicolas", "fsdd-theo", "fsdd-yweweler"]
FEW = [
    "common.log_interval=1",
    "common.log_format=json",
    "dataset.max_tokens=96000",
    "dataset.validate_interval_updates=100",
]


def test_published_sizes_of_os_kdft() -> None:
    cfg = recipe("os_kdft_hubert_base_voxceleb1")
    counts = RELATED["parameter_counts"]["os_kdft student (HuBERT, 2 layers)"]
    shape = student_shape(hubert_base(), cfg.model)
    size = count_parameters(shape, widths_of(shape))
    assert size == counts["encoder"] + counts["adapters"]
    assert f"| `os_kdft_hubert_base_voxceleb1` | {size:,} |" in PAGE
    first = recipe("os_kdft_xlsr_voxceleb2")
    xlsr = student_shape(hubert_large(conv_bias=True), first.model)
    size = count_parameters(xlsr, widths_of(xlsr))
    mask_embedding = 1024  # which encoders here lack
    published = RELATED["parameter_counts"]["os_kdft first scripts (XLSR-53, 4 layers)"]
    assert size + mask_embedding == published["student_with_adapters"]
    assert f"| `os_kdft_xlsr_voxceleb2` | {size:,} |" in PAGE
    cfg.model.adapter_activation = "elu"
    shape = student_shape(wavlm_base(), cfg.model)
    assert count_parameters(shape, widths_of(shape)) == 23_497_128 + 198_272
    classes = tuple(map(str, range(1211)))
    speaker = {"targets": {"speaker": Target("speaker", "labels.tsv", "speaker", classes, (1,) * 1211)}}
    sizes = {}
    for name, given in cfg.criterion.objectives.items():
        kind, _ = given.pop("_name"), given.pop("adapters", True)
        fields = OmegaConf.merge(OmegaConf.structured(OBJECTIVES[kind][1]), given)
        more = speaker if kind == "classification" else {}
        objective = OBJECTIVES[kind][0](fields, shape, [hubert_base()], name, **more)
        sizes[name] = sum(p.numel() for p in objective.parameters())
    assert sizes == {"distil": counts["kd_heads"], "speaker": counts["linear_backend"] + (192 + 1) * 1211}


def command(name: str, folder: Path, updates: int, *more: str, launcher: tuple = ()) -> list[dict[str, float]]:
    """The updates and the last validation that the page's command logs."""
    program, *arguments = EVERY_COMMAND[name]
    here = [f"hydra.run.dir={folder}", f"checkpoint.save_dir={folder}", f"optimization.max_update={updates}", *FEW]
    first = list(launcher) or [str(Path(sys.executable).with_name(program))]
    where = [a.replace("=examples/", f"={REPO}/examples/").replace("config/", f"{REPO}/config/") for a in arguments]
    log = run([*first, *where, *here, *more], folder)
    return [*logged(log, "train_inner"), *logged(log, "valid")[-1:]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_torch_file(folder / "checkpoint_last.pt")
    return {f"{part}.{name}": tensor for part in ("model", "criterion") for name, tensor in checkpoint[part].items()}


@pytest.mark.slow
def test_os_kdft_of_the_page(tmp_path: Path) -> None:
    """Two updates; the checkpoint is a student with adapters that loads without its teacher."""
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(TINY_TEACHER, teacher)
    *entries, valid = command("os_kdft", tmp_path, 2, f"task.teacher={teacher}")
    assert [entry["num_updates"] for entry in entries] == [1, 2]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["distil_loss"] + entry["speaker_loss"], abs=2e-4)
        assert 0 <= entry["speaker_accuracy"] <= 1
    assert 0 <= valid["speaker_accuracy"] <= 1
    teacher.unlink()
    checkpoint = load_torch_file(tmp_path / "checkpoint_last.pt")
    student = load_encoder(tmp_path / "checkpoint_last.pt")
    assert (student.config.encoder_layers, student.config.adapter_dim) == (2, 16)
    names = {group: len(state["state"]) for group, state in checkpoint["last_optimizer_state"].items()}
    # Two layers' adapters; seven linear maps, normalisation, and weights of layers.
    assert names["adapters"] == 2 * 4 and names["heads"] == 2 * 4 + 2 * 2 + 2 + 1
    assert checkpoint["cfg"]["task"]["targets"]["speaker"]["classes"] == SPEAKERS
    assert checkpoint["cfg"]["task"]["targets"]["speaker"]["counts"] == [40] * 6
    assert not [key for key in student.state_dict() if "head" in key or "classes" in key]


BY_EPOCH = ["_name=by_epoch", "+epochs=2", "+ramp_epochs=2", "+fresh_optimizer=true"]
FIRST_SCRIPTS = [
    "+model.adapter_form=residual",
    "+criterion.objectives.distil.weight_epochs=2",
    "criterion.objectives.speaker._name=aam_softmax",
    *(
        f"{'+' * field.startswith('+')}optimizer.groups.{group}.lr_scheduler.{field.lstrip('+')}"
        for group in ("default", "adapters", "heads")
        for field in BY_EPOCH
    ),
]


@pytest.mark.slow
def test_the_first_scripts_in_miniature(tmp_path: Path) -> None:
    """In the first of two epochs distillation has half its weight, and the student's rate is half the cosine's."""
    first, *_ = command("os_kdft", tmp_path, 2, *FIRST_SCRIPTS, "dataset.disable_validation=true")
    assert first["loss"] == pytest.approx(0.5 * first["distil_loss"] + first["speaker_loss"], abs=2e-4)
    assert first["lr_default"] == pytest.approx(0.5 * 0.001)
    assert load_encoder(tmp_path / "checkpoint_last.pt").config.adapter_form == "residual"


@pytest.mark.nightly
@pytest.mark.parametrize("overrides", [[], FIRST_SCRIPTS])
def test_os_kdft_goes_on_as_if_never_stopped(overrides: list[str], tmp_path: Path) -> None:
    """Bit for bit, with new noise in each update, and batch normalisation's statistics."""
    for folder, updates in (("whole", 4), ("parts", 2), ("parts", 4)):
        command("os_kdft", tmp_path / folder, updates, "dataset.disable_validation=true", *overrides)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert whole["criterion.objectives.speaker.embedding.norm.num_batches_tracked"] == 4


@pytest.mark.slow
def test_a_multi_task_student_without_a_teacher(tmp_path: Path) -> None:
    """From a student's file."""
    *entries, valid = command("multitask", tmp_path, 2, f"model.init_from={TINY_TEACHER}")
    assert [entry["num_updates"] for entry in entries] == [1, 2] and 0 <= valid["digit_accuracy"] <= 1
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["digit_loss"] + entry["speaker_loss"], abs=2e-4)
        assert 0 <= entry["digit_accuracy"] <= 1
    cfg: dict[str, Any] = load_torch_file(tmp_path / "checkpoint_last.pt")["cfg"]
    assert cfg["task"]["targets"]["digit"]["classes"] == [str(digit) for digit in range(10)]
    assert load_encoder(tmp_path / "checkpoint_last.pt").config == load_encoder(TINY_TEACHER).config


RECORD = """
import os, torch
import fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq

class Trainer(fairseq_cli.train.Trainer):
    def train_step(self, samples, raise_oom=False):
        result = super().train_step(samples, raise_oom)
        named = [*self.get_model().named_parameters(), *self.get_criterion().named_parameters()]
        torch.save({name: p.detach().clone() for name, p in named}, "rank" + os.environ["RANK"] + ".pt")
        return result

fairseq_cli.train.Trainer = Trainer
fairseq_cli.hydra_train.cli_main()
"""


@pytest.mark.nightly
def test_two_processes_train_one_student(tmp_path: Path) -> None:
    launcher = script(tmp_path, RECORD, processes=2)
    more = ["distributed_training.distributed_world_size=2", "distributed_training.distributed_backend=gloo"]
    *entries, _ = command("os_kdft", tmp_path, 2, *more, launcher=launcher)
    assert [entry["num_updates"] for entry in entries] == [1, 2]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys() and any(".adapter." in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
