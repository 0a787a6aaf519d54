"""Fine-tuning a student with fairseq's CTC models on real speech, from skill-labels to a word error rate."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import skill_fairseq
from skill_fairseq.audio.manifest import read_manifest, write_manifest
from skill_fairseq.checkpoints.load import load_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.cli.labels import main as skill_labels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
TINY = ROOT / "examples" / "tiny"
DIGITS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
UPDATES = 180
PLAIN = [
    "model.apply_mask=false",
    *(f"model.{kind}=0.0" for kind in ("dropout", "activation_dropout", "final_dropout")),
]
ENVIRONMENT = {
    **os.environ,
    "SKILL_FAIRSEQ_USER_DIR": str(Path(skill_fairseq.__file__).parent),
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def logged(log: str, kind: str, field: str) -> list[float]:
    """The values of a field in log order."""
    entries = re.findall(rf"\[{kind}\]\[INFO\] - (\{{.*\}})", log)
    return [float(json.loads(entry)[field]) for entry in entries]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``ltr`` and ``spm`` of skill-labels: ten spoken digits, for both training and test."""
    folder = tmp_path_factory.mktemp("labels")
    manifest = read_manifest(TINY / "data" / "tasks" / "digit" / "train.tsv")
    chosen = [i for i, path in enumerate(manifest.paths) if re.search(r"fsdd-george-\d-10", path)]
    paths, sizes = [manifest.paths[i] for i in chosen], [manifest.sizes[i] for i in chosen]
    assert len(paths) == 10
    names = [Path(path).stem for path in paths]
    (folder / "text.tsv").write_text("".join(f"{name}\t{DIGITS[int(name.split('-')[2])]}\n" for name in names))
    for split in ("train", "valid"):
        write_manifest(folder / f"{split}.tsv", manifest.root, paths, sizes)
    for kind, options in (("ltr", []), ("spm", ["--units", "unigram", "--vocabulary-size", "20"])):
        manifests = [str(folder / "train.tsv"), str(folder / "valid.tsv")]
        transcripts = ["--transcripts", str(folder / "text.tsv"), "--out", str(folder / kind)]
        assert skill_labels([*manifests, *transcripts, *options]) == 0
    return folder


def compose_run(config: str, name: str, *overrides: str) -> Any:
    """A config as ``fairseq-hydra-train`` composes it."""
    from fairseq.dataclass.initialize import add_defaults, hydra_init
    from hydra.core.global_hydra import GlobalHydra
    from hydra.experimental import compose, initialize_config_dir

    hydra_init(name)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG / config)):
        cfg = compose(name, list(overrides))
    add_defaults(cfg)
    return cfg


@pytest.fixture(scope="module")
def stages(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of stage 1 (gated) and 2 (part of the small real teacher cut away), as fairseq's trainer saves them.

    Their gates are untrained, so the student is damaged, unlike after a real stage 1.
    """
    from fairseq import tasks
    from fairseq.trainer import Trainer

    folder = tmp_path_factory.mktemp("stages")
    teacher = folder / "teacher.safetensors"
    shutil.copy(TINY / "teacher" / "teacher.safetensors", teacher)
    checkpoints = {1: folder / "stage1.pt", 2: folder / "stage2.pt"}
    for stage, config, own in (
        (1, "distill", "criterion.target_sparsity=0.25"),
        (2, "final", f"model.init_from={checkpoints[1]}"),
    ):
        where = (f"task.data={labels}", f"task.teacher={teacher}", "checkpoint.no_save_optimizer_state=true")
        cfg = compose_run(config, "tiny", *where, "criterion.groups=[[0],[1,2]]", own)
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(stage)  # of the gates, and thus of the removed units
        model = task.build_model(cfg.model)
        Trainer(cfg, task, model, task.build_criterion(cfg.criterion)).save_checkpoint(str(checkpoints[stage]), {})
    teacher.unlink()  # no longer needed
    return checkpoints


def finetune(folder: Path, labels: Path, student: Path, model: str, kind: str) -> str:
    """The log of ``fairseq-hydra-train`` on a kind of labels, in a folder that also gets its checkpoints."""
    where = ["--config-dir", str(CONFIG / "finetune"), "--config-name", "tiny_ctc", "hydra.run.dir=."]
    overrides = [
        f"task.data={labels / kind}",
        f"task.labels={kind}",
        f"criterion.post_process={'letter' if kind == 'ltr' else 'sentencepiece'}",
        f"model._name={model}",
        f"model.w2v_path={student}",
        f"optimization.max_update={UPDATES}",
        f"dataset.validate_interval_updates={UPDATES // 2}",
        "dataset.batch_size=1",  # no padding, because this teacher's group norm depends on it and decode.py has none
        *PLAIN,
        "checkpoint.save_dir=.",
        "common.log_format=json",
        "common.log_interval=1",
    ]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("fairseq-hydra-train")), *where, *overrides],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


@pytest.fixture(scope="module")
def hubert_ctc(labels: Path, stages: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and log of hubert_ctc on letters."""
    folder = tmp_path_factory.mktemp("hubert_ctc")
    return folder, finetune(folder, labels, stages[2], "hubert_ctc", "ltr")


@pytest.fixture(scope="module")
def wav2vec_ctc(labels: Path, stages: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and log of wav2vec_ctc on SentencePiece units."""
    folder = tmp_path_factory.mktemp("wav2vec_ctc")
    return folder, finetune(folder, labels, stages[2], "wav2vec_ctc", "spm")


@pytest.fixture(scope="module")
def decode() -> Any:
    """``main`` of examples/ctc/decode.py."""
    spec = importlib.util.spec_from_file_location("decode", ROOT / "examples" / "ctc" / "decode.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def check_run(folder: Path, log: str, data: Path, decode: Any, capsys: pytest.CaptureFixture) -> None:
    """The loss fell, the digits are learned, and fairseq's Viterbi decoder agrees with its criterion."""
    losses, errors = logged(log, "train_inner", "loss"), logged(log, "valid", "valid_wer")
    assert len(losses) == UPDATES and sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert len(errors) == 2 and errors[-1] <= 10
    decode([str(folder / "checkpoint_last.pt"), str(data), "train", "--out", str(folder / "recognised")])
    printed = capsys.readouterr().out
    found = re.search(r"train: WER ([\d.]+) % \((\d+) errors in 10 words, 10 recordings\)", printed)
    assert found is not None and float(found[1]) == 10 * int(found[2]) == errors[-1], printed
    header, *rows = (folder / "recognised" / "train.tsv").read_text().splitlines()
    assert header == "path\tsaid\trecognised" and len(rows) == 10
    assert [row.split("\t")[1] for row in rows] == [
        DIGITS[int(Path(path).stem.split("-")[2])] for path in read_manifest(data / "train.tsv").paths
    ]
    assert sum(said != heard for _, said, heard in (row.split("\t") for row in rows)) == int(found[2])


@pytest.mark.formats("out", "fairseq hubert_ctc", "fairseq 0.12.2")
def test_hubert_ctc_learns_letters(hubert_ctc: tuple, labels: Path, decode: Any, capsys: pytest.CaptureFixture) -> None:
    check_run(*hubert_ctc, labels / "ltr", decode, capsys)


@pytest.mark.nightly
@pytest.mark.formats("out", "fairseq wav2vec_ctc", "fairseq 0.12.2")
def test_wav2vec_ctc_learns_sentence_pieces(
    wav2vec_ctc: tuple, labels: Path, decode: Any, capsys: pytest.CaptureFixture
) -> None:
    check_run(*wav2vec_ctc, labels / "spm", decode, capsys)


def build(labels: Path, student: Path, *overrides: str) -> tuple[Any, Any, dict[str, Any], Any]:
    """Task, model, one padded batch and criterion, built like in fairseq's training."""
    from fairseq import tasks

    cfg = compose_run(
        "finetune", "tiny_ctc", f"task.data={labels}/ltr", f"model.w2v_path={student}", *PLAIN, *overrides
    )
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    torch.manual_seed(0)
    model = task.build_model(cfg.model)
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in range(3)])
    assert batch["net_input"]["padding_mask"].any()
    return task, model, batch, task.build_criterion(cfg.criterion)


@pytest.mark.parametrize("stage", [1, 2])
def test_both_models_see_the_students_features(labels: Path, stages: dict[int, Path], stage: int) -> None:
    """hubert_ctc unpacks a pair, wav2vec_ctc looks up names: both get load_encoder's numbers."""
    outputs, losses = [], []
    for name in ("hubert_ctc", "wav2vec_ctc"):
        _, model, batch, criterion = build(labels, stages[stage], f"model._name={name}")
        encoder = model.eval().w2v_encoder.w2v_model.speech_encoder
        assert bool(encoder.config.pruning_units) == (stage == 1)
        with torch.no_grad():
            want = load_encoder(stages[stage])(**batch["net_input"])
            out = model(**batch["net_input"])
            losses.append(criterion(model, batch)[0].item())
        assert torch.allclose(out["encoder_out"], model.w2v_encoder.proj(want.x).transpose(0, 1), atol=1e-5)
        assert torch.equal(out["padding_mask"], want.padding_mask) and want.padding_mask.any()
        outputs.append(out["encoder_out"])
    assert torch.equal(*outputs) and losses[0] == losses[1] > 0


def test_gradients_follow_the_config(labels: Path, stages: dict[int, Path]) -> None:
    """feature_grad_mult scales the conv stack's gradient, 0 freezes it; the mask embedding learns if it masks."""
    gradients = {}
    for mult in (0.0, 0.1, 1.0):
        _, model, batch, criterion = build(labels, stages[2], f"model.feature_grad_mult={mult}")
        criterion(model.train(), batch)[0].backward()
        student = model.w2v_encoder.w2v_model
        assert student.mask_emb.requires_grad and student.mask_emb.grad is None
        gradients[mult] = {name: p.grad for name, p in student.speech_encoder.named_parameters()}
    assert any(name.startswith("feature_extractor.") for name in gradients[1.0])
    for name, gradient in gradients[1.0].items():
        if name.startswith("feature_extractor."):
            assert gradients[0.0][name] is None and gradient.abs().max() > 0
            assert torch.allclose(gradients[0.1][name], 0.1 * gradient, rtol=1e-4, atol=1e-8), name
        else:
            assert torch.allclose(gradients[0.0][name], gradient, rtol=1e-4, atol=1e-6), name
    masking = ("model.apply_mask=true", "model.mask_prob=0.5", "model.mask_length=2", "model.mask_channel_prob=0.2")
    _, model, batch, criterion = build(labels, stages[2], *masking, "model.mask_channel_length=4")
    criterion(model.train(), batch)[0].backward()
    assert model.w2v_encoder.w2v_model.mask_emb.grad.abs().max() > 0
    with torch.no_grad():  # evaluation masks nothing
        assert torch.equal(*(model.eval()(**batch["net_input"])["encoder_out"] for _ in range(2)))


def test_hubert_pretraining_fine_tunes_too(labels: Path, stages: dict[int, Path]) -> None:
    """The task of fairseq's own HuBERT recipes gives the same loss for the same batch."""
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig, HubertPretrainingTask
    from omegaconf import OmegaConf

    task, model, batch, criterion = build(labels, stages[2])
    fields = {"fine_tuning": True, "labels": ["ltr"], "single_target": True, "pad_audio": True, "random_crop": False}
    cfg = OmegaConf.merge(OmegaConf.structured(HubertPretrainingConfig), {"data": f"{labels}/ltr", **fields})
    other = HubertPretrainingTask.setup_task(cfg)
    other.load_dataset("train")
    dataset = other.dataset("train")
    same = dataset.collater([dataset[i] for i in range(3)])
    with torch.no_grad():
        losses = [criterion(model.eval(), each)[0].item() for each in (batch, same)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["hubert_ctc", "wav2vec_ctc"])
def test_a_strangers_student_runs_no_code(labels: Path, stages: dict[int, Path], tmp_path: Path, name: str) -> None:
    checkpoint = load_torch_file(stages[2], trust=True)
    checkpoint["extra_state"]["more"] = RunsCode(tmp_path / "made")
    torch.save(checkpoint, tmp_path / "stranger.pt")
    with pytest.raises(ValueError, match="stranger.pt: .*posix.mkdir.*SKILL_FAIRSEQ_TRUST"):
        build(labels, tmp_path / "stranger.pt", f"model._name={name}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["hubert_ctc", "wav2vec_ctc"])
def test_fine_tuned_checkpoints_stand_alone(
    request: pytest.FixtureRequest, labels: Path, stages: dict[int, Path], tmp_path: Path, name: str
) -> None:
    """Neither the student's checkpoint nor the teacher is needed to load them, by fairseq and by load_encoder."""
    from fairseq.checkpoint_utils import load_model_ensemble_and_task

    folder, _ = request.getfixturevalue(name)
    shutil.copy(folder / "checkpoint_last.pt", tmp_path / "fine-tuned.pt")
    cfg = plain(load_torch_file(tmp_path / "fine-tuned.pt")["cfg"])
    assert cfg["model"]["w2v_args"]["model"]["_name"] == "skill_student"
    away = stages[2].with_name("away.pt")
    stages[2].rename(away)
    try:
        (model,), _, _ = load_model_ensemble_and_task([str(tmp_path / "fine-tuned.pt")])
        encoder = load_encoder(tmp_path / "fine-tuned.pt")
    finally:
        away.rename(stages[2])
    source = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, padding_mask = model.eval().w2v_encoder.w2v_model.extract_features(source)
        assert padding_mask is None and torch.allclose(encoder(source).x, x, atol=1e-5)
        assert not torch.allclose(load_encoder(stages[2])(source).x, x, atol=1e-2)  # it has learned
