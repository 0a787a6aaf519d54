"""Both stages with fairseq-hydra-train itself: logs, checkpoints, and resuming."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CONFIG, ENVIRONMENT, logged, run, train

from skill_fairseq.checkpoints.load import load_encoder, read_source
from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.pruning.lagrangian import linear_warmup_decay, target_sparsity

pytestmark = pytest.mark.slow

UPDATES, WARMUP, TARGET, SPARSITY_WARMUP = 12, 3, 0.5, 6
GROUPS = "[[0],[1,2],[3]]"
SHORT = [
    "common.log_format=json",
    "common.log_interval=1",
    "dataset.max_tokens=60000",
    "dataset.validate_interval_updates=4",
    "checkpoint.save_interval_updates=4",
    "checkpoint.keep_interval_updates=-1",
    f"criterion.groups={GROUPS}",
    f"optimization.max_update={UPDATES}",
    "optimization.lr=[0.001]",
]
PEAKS = {"default": 0.001, "gates": 0.1, "multipliers": 0.2}
STAGE_1 = [
    *SHORT,
    f"criterion.target_sparsity={TARGET}",
    f"criterion.sparsity_warmup={SPARSITY_WARMUP}",
    *(f"optimizer.groups.{group}.lr_scheduler.warmup_updates={WARMUP}" for group in PEAKS),
    *(f"optimizer.groups.{group}.lr_float={peak}" for group, peak in PEAKS.items()),
]


@pytest.fixture(scope="module")
def data(speech: Path, teacher_file: Path) -> list[str]:
    return [f"task.data={speech}", f"task.teacher={teacher_file}"]


@pytest.fixture(scope="module")
def stage1(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and log of a run of stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    return folder, train(folder, "distill", *data, *STAGE_1)


@pytest.fixture(scope="module")
def stage2(data: list[str], stage1: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and log of a run of stage 2 from there."""
    folder = tmp_path_factory.mktemp("stage2")
    start = f"model.init_from={stage1[0] / 'checkpoint_last.pt'}"
    return folder, train(folder, "final", *data, *SHORT, start, f"lr_scheduler.warmup_updates={WARMUP}")


def test_stage_1_logs_what_one_wants_to_see(stage1: tuple) -> None:
    entries = logged(stage1[1], "train_inner")
    assert [entry["num_updates"] for entry in entries] == list(range(1, UPDATES + 1))
    per_group = {f"{part}_g{group}" for part in ("l1", "cos") for group in range(3)}
    size = {"expected_sparsity", "target_sparsity", "lambda1", "lambda2"}
    for entry in entries:
        assert per_group | size | {"loss", "distillation_loss", "audio_s_per_s", "gnorm"} <= set(entry)
        assert 0 < entry["l1_g1"] and 0.5 < entry["cos_g1"] <= 1
        kd = sum(entry[f"l1_g{g}"] - entry[f"cos_g{g}"] for g in range(3)) / 3
        assert entry["distillation_loss"] == pytest.approx(kd, abs=2e-4)
        excess = entry["expected_sparsity"] - entry["target_sparsity"]
        size_term = entry["lambda1"] * excess + entry["lambda2"] * excess**2
        assert entry["loss"] - entry["distillation_loss"] == pytest.approx(size_term, abs=1e-3)
    assert all(entry["audio_s_per_s"] > 0 for entry in entries[1:])  # fairseq starts its clock at the first


def test_learning_rates_and_target_follow_their_schedules(stage1: tuple) -> None:
    """The n-th update logs the rates of the next one."""
    for entry in logged(stage1[1], "train_inner"):
        n = int(entry["num_updates"])
        factor = linear_warmup_decay(n, WARMUP, UPDATES)
        for group, peak in PEAKS.items():
            assert entry[f"lr_{group}"] == pytest.approx(peak * factor, rel=1e-4)
        assert entry["target_sparsity"] == pytest.approx(target_sparsity(n - 1, SPARSITY_WARMUP, TARGET), abs=1e-4)


def test_multipliers_ascend_and_the_student_shrinks(stage1: tuple) -> None:
    entries = logged(stage1[1], "train_inner")
    assert entries[0]["lambda1"] == entries[0]["lambda2"] == 0
    assert entries[-1]["lambda1"] < -0.5 and entries[-1]["lambda2"] > 0.5
    assert entries[-1]["expected_sparsity"] > entries[0]["expected_sparsity"]


def test_validation_is_the_distillation_loss_of_whole_utterances(stage1: tuple) -> None:
    entries = logged(stage1[1], "valid")
    assert [entry["num_updates"] for entry in entries] == [4, 8, 12]
    for entry in entries:
        assert entry["loss"] == entry["distillation_loss"]
        assert {"l1_g0", "cos_g2", "expected_sparsity", "lambda1"} <= set(entry)


def test_checkpoint_holds_the_student_alone(stage1: tuple, teacher_file: Path) -> None:
    checkpoint = load_torch_file(stage1[0] / "checkpoint_last.pt")
    names = set(checkpoint["model"])
    teacher = load_encoder(teacher_file)
    gates = {name for name in names if name.startswith("speech_encoder.gates.")}
    assert gates
    assert names - gates == {"mask_emb", *("speech_encoder." + name for name in teacher.state_dict())}
    assert {name.split(".")[0] for name in checkpoint["criterion"]} == {"projections", "constraint"}
    cfg = plain(checkpoint["cfg"])
    assert cfg["model"]["encoder_layers"] == 3 and cfg["model"]["pruning_units"] == ["conv", "heads", "ffn"]
    assert checkpoint["optimizer_history"][-1]["num_updates"] == UPDATES
    said = read_source(stage1[0] / "checkpoint_last.pt").provenance
    assert said["target_sparsity"] == TARGET and said["num_updates"] == UPDATES


def test_stage_2_goes_on_with_the_shrunk_student(stage1: tuple, stage2: tuple, teacher_file: Path) -> None:
    folder, log = stage2
    student, full = load_encoder(folder / "checkpoint_last.pt"), load_encoder(teacher_file).num_parameters()
    assert student.num_parameters() == pytest.approx((1 - TARGET) * full, rel=0.005)
    assert not list(student.named_gates()) and student.config.original_parameters == full
    entries = logged(log, "train_inner")
    assert [entry["num_updates"] for entry in entries] == list(range(1, UPDATES + 1))
    assert "expected_sparsity" not in entries[0] and entries[0]["loss"] == entries[0]["distillation_loss"]
    assert logged(log, "valid")[-1]["loss"] < logged(log, "valid")[0]["loss"]
    projections = [
        load_torch_file(run / "checkpoint_last.pt")["criterion"]["projections.projections.0.weight"]
        for run in (stage1[0], folder)
    ]
    # It loaded stage 1's: 12 Adam updates of at most 0.001 cannot explain the difference from the identity.
    assert (projections[0] - projections[1]).abs().max() <= 0.001 * UPDATES
    assert (projections[0] - torch.eye(32)).abs().max() > 0.003


def test_checkpoints_load_elsewhere_without_teacher_and_data(
    small: Any, tmp_path: Path, teacher_file: Path, speech: Path, stage1: tuple, stage2: tuple
) -> None:
    """A run whose teacher and data are deleted and whose files are moved; a new process loads them."""
    shutil.copy(teacher_file, tmp_path / "teacher.safetensors")
    shutil.copytree(speech, tmp_path / "speech")
    where = [f"task.data={tmp_path / 'speech'}", f"task.teacher={tmp_path / 'teacher.safetensors'}"]
    train(tmp_path / "own", "distill", *where, *STAGE_1, "optimization.max_update=4")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(str(tmp_path / "own" / "checkpoint_last.pt"), str(elsewhere / "own.pt"))
    for gone in ("own", "speech"):
        shutil.rmtree(tmp_path / gone)
    (tmp_path / "teacher.safetensors").unlink()
    shutil.copy(stage2[0] / "checkpoint_last.pt", elsewhere / "final.pt")
    source = small.waves()
    torch.save(source, elsewhere / "source.pt")
    run(
        [
            sys.executable,
            "-c",
            "import torch, skill_fairseq\n"
            "from fairseq.checkpoint_utils import load_model_ensemble_and_task\n"
            "source = torch.load('source.pt')\n"
            "for name in ('own', 'final'):\n"
            "    (model,), cfg, task = load_model_ensemble_and_task([name + '.pt'])\n"
            "    with torch.no_grad():\n"
            "        torch.save(model.eval()(source)['hidden_states'], name + '.out')\n",
        ],
        elsewhere,
    )
    for name in ("own", "final"):
        with torch.no_grad():
            want = load_encoder(elsewhere / f"{name}.pt")(source).hidden_states
        got = torch.load(elsewhere / f"{name}.out")
        assert len(got) == len(want) == 4
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(want, got))


def test_an_interrupted_run_goes_on(data: list[str], stage1: tuple, tmp_path: Path) -> None:
    shutil.copy(next(stage1[0].glob("checkpoint_*_8.pt")), tmp_path / "checkpoint_last.pt")
    log = train(tmp_path, "distill", *data, *STAGE_1)
    entries, first = logged(log, "train_inner"), logged(stage1[1], "train_inner")
    assert [entry["num_updates"] for entry in entries] == list(range(9, UPDATES + 1))
    for name in ("lambda1", "lambda2", "expected_sparsity", "target_sparsity", "lr_gates"):
        assert entries[0][name] == first[8][name]
    assert load_torch_file(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == UPDATES


def test_bad_config_ends_before_training_with_the_field_and_the_remedy(data: list[str], tmp_path: Path) -> None:
    where = ["--config-dir", str(CONFIG / "distill"), "--config-name", "tiny", "hydra.run.dir=."]
    command = [str(Path(sys.executable).with_name("fairseq-hydra-train")), *where, *data, *STAGE_1]
    result = subprocess.run(
        [*command, "criterion.groups=[[0],[7]]"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert re.search("criterion.groups.*layer 7.*0..3", result.stderr + result.stdout)
    assert not list(tmp_path.rglob("*.pt"))
