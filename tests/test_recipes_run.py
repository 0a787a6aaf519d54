"""Recipes make two updates: those for other teachers, in each stage, with a small random teacher of that architecture;
and those for students whose shape differs from the teacher's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import fairseq_cli.train
import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.dataclass.initialize import hydra_init
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import run

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.cli import shrink
from skill_fairseq.files import content_sha256

CONFIG = Path(__file__).resolve().parents[1] / "config"
LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "normalize": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "hubert_base": {"relative_position": False},
    "hubert_large": {**LARGE, "relative_position": False},
    "wavlm_large": {**LARGE, "relative_position": True},
}
# For a machine without GPUs and 13 s of speech; all else is the recipe's.
HERE = (
    *("common.cpu=true", "distributed_training.distributed_world_size=1", "dataset.num_workers=0"),
    *("common.tensorboard_logdir=null", "dataset.max_tokens=70000", "optimization.max_update=2"),
)
GROUPS = "criterion.groups=[[0],[1,2],[3]]"


@pytest.fixture(scope="module")
def data(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = [2.0 + 0.05 * i for i in range(8)]
    return small.write_speech(tmp_path_factory.mktemp("speech"), {"train": lengths, "valid": [0.5, 0.7]})


SAME_SCHEDULE = (
    "optimizer.groups.default.lr_scheduler.total_num_update=2",
    "optimizer.groups.default.lr_scheduler.warmup_updates=1",
    "optimizer.groups.gates.lr_scheduler.total_num_update=2",
    "optimizer.groups.multipliers.lr_scheduler.total_num_update=2",
    "criterion.sparsity_warmup=1",
)
"""The same schedule for runs of one and two updates."""


def train(kind: str, name: str, folder: Path, *overrides: str, updates: int = 2) -> tuple[dict[str, Any], Path]:
    """The saved config of a run of this recipe, and its checkpoint."""
    hydra_init(name)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG / kind)):
        cfg = compose(name, overrides=[*HERE, f"checkpoint.save_dir={folder / kind}", GROUPS, *overrides])
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    OmegaConf.set_struct(cfg, True)
    fairseq_cli.train.main(cfg)
    last = folder / kind / "checkpoint_last.pt"
    checkpoint = load_torch_file(last)
    assert checkpoint["optimizer_history"][-1]["num_updates"] == updates
    return plain(checkpoint["cfg"]), last


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_stages(name: str, small: Any, data: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    save_encoder(small.random_encoder(**ARCHITECTURES[name]), teacher)
    where = (f"task.data={data}", f"task.teacher={teacher}")
    recipe = f"{name}_librispeech"
    saved, stage1 = train("distill", recipe, tmp_path, *where, "criterion.target_sparsity=0.5")
    assert saved["criterion"]["normalize_states"] is name.endswith("large")
    assert [group["lr_scheduler"]["warmup_updates"] for group in saved["optimizer"]["groups"].values()] == [0.3] * 3
    full = load_encoder(teacher)
    gated = load_encoder(stage1)
    assert gated.config.pruning_units and gated.config.layer_norm_first is full.config.layer_norm_first
    _, stage2 = train("final", recipe, tmp_path, *where, f"model.init_from={stage1}")
    assert load_encoder(stage2).num_parameters() == pytest.approx(full.num_parameters() / 2, rel=0.01)


@pytest.fixture(scope="module")
def deep(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 12 layers, like Base models."""
    path = tmp_path_factory.mktemp("deep") / "teacher.safetensors"
    save_encoder(small.random_encoder(encoder_layers=12), path)
    return path


DEEP_GROUPS = "criterion.groups=[[0],[1,2,3],[4,5,6,7],[8,9,10,11,12]]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "layers"),
    [("two_layers", [1, 2]), ("every_second", [2, 4, 6, 8, 10, 12]), ("tiny_thin", None)],
)
def test_students_of_other_shapes(
    student: str, layers: list[int] | None, data: Path, deep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(deep, teacher)
    where = (f"task.data={data}", f"task.teacher={teacher}", DEEP_GROUPS)
    with caplog.at_level("INFO"):
        saved, last = train("final", "tiny", tmp_path, f"+student={student}", *where)
    teacher.unlink()
    assert saved["model"]["init_layers"] == layers
    groups = {2: "((0,), (1,), (1,), (1, 2))", 6: "((0,), (1, 2), (2, 3, 4), (4, 5, 6))"}  # of the student's layers
    found, theirs = load_encoder(last), load_encoder(deep)
    if layers is None:
        assert found.config.encoder_layers == 12
        assert found.config.encoder_embed_dim == 48 and found.config.conv_channels[-1] == 48
        return
    assert found.config.encoder_layers == len(layers)
    assert any(groups[len(layers)] in message for message in caplog.messages)
    for own, number in enumerate(layers):  # after two updates they are still close to their start
        before, after = (x.transformer.layers[i].ffn.fc1.weight for x, i in ((theirs, number - 1), (found, own)))
        assert 0 < (after - before).norm() / before.norm() < 0.05


@pytest.mark.slow
def test_one_layer(data: Path, deep: Path, tmp_path: Path) -> None:
    """Only the teacher's ninth layer: pruned, shrunk and distilled again."""
    where = (f"task.data={data}", f"task.teacher={deep}", "+student=layer_9", "criterion.groups=[[9]]")
    still = ("optimization.lr=[1e-8]", "optimizer.groups.gates.lr_float=1e-8")
    saved, stage1 = train("distill", "tiny", tmp_path, *where, *still, "criterion.target_sparsity=0.5")
    assert saved["criterion"]["student_groups"] == [[9]]
    again = (f"model.init_from={stage1}", "model.init_layers=null")
    _, stage2 = train("final", "tiny", tmp_path, *where, *again)
    full, student = load_encoder(deep), load_encoder(stage2)
    nine = full.num_parameters() - 3 * sum(p.numel() for p in full.transformer.layers[-1].parameters())
    assert student.config.encoder_layers == 9 and student.num_parameters() == pytest.approx(nine / 2, rel=0.01)
    start = load_encoder(stage1)  # its gates are open, so it equals the teacher's first nine layers
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, theirs = start(audio).hidden_states[-1], full(audio).hidden_states[9]
    assert (own - theirs).abs().mean() < 0.02 * theirs.abs().mean()


@pytest.mark.slow
def test_gates_on_a_thin_student(data: Path, deep: Path, tmp_path: Path) -> None:
    where = (f"task.data={data}", f"task.teacher={deep}", DEEP_GROUPS)
    saved, stage1 = train("distill", "tiny", tmp_path, "+student=tiny_thin", *where, "criterion.target_sparsity=0.5")
    gated = load_encoder(stage1)
    assert gated.config.pruning_units == ["conv", "heads", "ffn"]
    full = saved["model"]["original_parameters"]
    assert full == gated.num_parameters()
    shrink.main([str(stage1), str(tmp_path / "small.safetensors")])
    half = load_encoder(tmp_path / "small.safetensors")
    assert half.num_parameters() == pytest.approx(full / 2, rel=0.01)
    assert half.config.conv_channels[-1] == half.config.encoder_embed_dim == 48
    _, stage2 = train("final", "tiny", tmp_path, *where, f"model.init_from={stage1}")
    assert load_encoder(stage2).config == half.config


@pytest.mark.slow
def test_log_mel_features_in_place_of_the_waveform(data: Path, deep: Path, tmp_path: Path) -> None:
    """Prunes and distils again; a run resumed after its first update makes the same second one as an uninterrupted
    run."""
    where = (f"task.data={data}", f"task.teacher={deep}", DEEP_GROUPS, "criterion.target_sparsity=0.5")
    found = []
    for folder in ("whole", "interrupted"):
        if folder == "interrupted":
            once = (*where, "optimization.max_update=1", *SAME_SCHEDULE)
            train("distill", "tiny", tmp_path / folder, "+student=tiny_log_mel", *once, updates=1)
        saved, stage1 = train("distill", "tiny", tmp_path / folder, "+student=tiny_log_mel", *where, *SAME_SCHEDULE)
        found.append(load_torch_file(stage1)["model"])
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    assert (saved["model"]["mel_bins"], saved["model"]["init_parts"]) == (40, ["pos_conv", "layer_norm", "layers"])
    gated, full = load_encoder(stage1), load_encoder(deep)
    moved = [(a - b).norm() / b.norm() for a, b in zip(gated.transformer.parameters(), full.transformer.parameters())]
    assert max(moved) < 0.1 and gated.config.mel_bins == 40
    _, stage2 = train("final", "tiny", tmp_path, *where[:3], f"model.init_from={stage1}")
    student = load_encoder(stage2)
    assert student.num_parameters() == pytest.approx(gated.num_parameters() / 2, rel=0.01)
    assert student.config.mel_bins == 40 and student.config.num_frames(48000) == full.config.num_frames(48000)


@pytest.mark.nightly
def test_two_teachers_of_two_widths_in_both_stages(small: Any, data: Path, teacher_file: Path, tmp_path: Path) -> None:
    """With fairseq-hydra-train itself and paths as in the shell; stage 2 is interrupted and resumed."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    shutil.copy(teacher_file, first)
    torch.manual_seed(3)
    save_encoder(small.random_encoder(encoder_layers=5, encoder_embed_dim=48), second)
    common = [f"task.data={data}", "dataset.max_tokens=70000", "criterion.projection_sharing=none"]
    common += [
        "task.teacher=[first.safetensors,second.safetensors]",
        "criterion.groups=[[0,1/0],[1,2,1/3],[3,1/4,1/5]]",
    ]

    def stage(kind: str, updates: int, *overrides: str) -> tuple[str, dict[str, Any]]:
        where = [
            f"hydra.run.dir={kind}",
            f"checkpoint.save_dir={tmp_path / kind}",
            f"optimization.max_update={updates}",
        ]
        command = [str(Path(sys.executable).with_name("fairseq-hydra-train")), "--config-dir", str(CONFIG / kind)]
        log = run([*command, "--config-name", "tiny", *where, *common, *overrides], tmp_path)
        return log, load_torch_file(tmp_path / kind / "checkpoint_last.pt")

    _, checkpoint = stage("distill", 2, "criterion.target_sparsity=0.5")
    saved = plain(checkpoint["cfg"])
    assert saved["task"]["teacher"] == [str(first), str(second)] and saved["model"]["init_from"] == str(first)
    assert saved["criterion"]["groups"] == [[0, "1/0"], [1, 2, "1/3"], [3, "1/4", "1/5"]]
    weights = {name: tuple(w.shape) for name, w in checkpoint["criterion"].items() if name.endswith("weight")}
    shapes = [(32, 32)] * 3 + [(48, 32)] * 3
    assert weights == {f"projections.projections.{i}.weight": shape for i, shape in enumerate(shapes)}
    assert checkpoint["extra_state"]["teacher_sha256"] == f"{content_sha256(first)}, {content_sha256(second)}"

    _, before = stage("final", 1, "model.init_from=distill/checkpoint_last.pt")
    log, after = stage("final", 2, "model.init_from=distill/checkpoint_last.pt")
    assert "@ 1 updates" in log and "another teacher" not in log and "settings have changed" not in log
    assert [c["optimizer_history"][-1]["num_updates"] for c in (before, after)] == [1, 2]
    assert set(weights) <= set(after["criterion"]) == set(before["criterion"])
    last = tmp_path / "final" / "checkpoint_last.pt"
    assert read_source(last).provenance["teacher"] == ["first.safetensors", "second.safetensors"]
    for file in (first, second, tmp_path / "distill" / "checkpoint_last.pt"):
        file.unlink()
    half, full = load_encoder(last), load_encoder(teacher_file)
    assert half.num_parameters() == pytest.approx(full.num_parameters() / 2, rel=0.01)
    models, _, task = load_model_ensemble_and_task([str(last)])
    assert task.cfg.teacher == [str(first), str(second)]
    wave = small.waves()
    assert torch.equal(models[0].eval().speech_encoder(wave).hidden_states[-1], half.eval()(wave).hidden_states[-1])


@pytest.mark.nightly
def test_a_list_of_one_teacher_is_that_teacher(data: Path, teacher_file: Path, tmp_path: Path) -> None:
    found = []
    for name, teacher in (("plain", f"{teacher_file}"), ("list", f"[{teacher_file}]")):
        where = (f"task.data={data}", f"task.teacher={teacher}", "criterion.target_sparsity=0.5")
        _, last = train("distill", "tiny", tmp_path / name, *where)
        found.append(load_torch_file(last))
        assert read_source(last).provenance["teacher"] == teacher_file.name
    one, other = found
    for part in ("model", "criterion"):
        assert list(one[part]) == list(other[part])
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
