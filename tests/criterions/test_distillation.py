"""The sum of objectives: SKILL's alone, with a new one, in real runs and from labels; and refusals."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import new_objective
import pytest
import torch
import torch.nn.functional as F
from messages import says
from omegaconf import OmegaConf
from runs import CONFIG, logged, run
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.modules.taps import Tap
from skill_fairseq.modules.transformer import Dropouts
from skill_fairseq.objectives import objective
from tests.conftest import LARGE_STYLE, random_encoder

SKILL = {"_name": "group_means", "groups": [[0], [1, 2], [3]]}
NEW = {"_name": "heads_and_maps", "layers": [2, 3], "map_weight": 0.5}


@pytest.fixture
def build(small: Any, speech: Path, teacher_file: Path, tmp_path: Path) -> Any:
    """Builds (task, model, criterion); the student's weights are not the teacher's."""
    save_encoder(random_encoder(seed=3), tmp_path / "student.safetensors")

    def make(name: str = "distillation", student: Path = tmp_path / "student.safetensors", **fields: Any) -> tuple:
        task = small.make_task(speech, fields.pop("teacher", teacher_file))
        model = task.build_model(small.student_config(student, pruning_units=fields.pop("units", [])))
        cfg = OmegaConf.create({"_name": name, **fields})
        criterion = task.build_criterion(cfg)
        torch.manual_seed(0)
        for parameter in criterion.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        return task, model.eval(), criterion.eval(), cfg

    return make


def batch(small: Any) -> dict[str, Any]:
    return {"net_input": {"source": small.waves()}}


def test_skill_by_its_own_criterion_is_the_sum_of_one(build: Any, small: Any) -> None:
    fields = {name: value for name, value in SKILL.items() if name != "_name"}
    found = []
    for made in (build("skill_group_kd", **fields), build(objectives={"skill": SKILL})):
        _, model, criterion, _ = made
        loss, _, log = criterion(model, batch(small))
        loss.backward()
        found.append((loss, log, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, log, gradients), (other, others, same) = found
    assert torch.equal(loss, other)
    renamed = {re.sub(r"^(l1|cos)_g", r"skill_\1_g", name): value for name, value in log.items()}
    assert {**renamed, "skill_loss": log["loss"]} == others
    assert gradients.keys() == same.keys() and all(torch.equal(gradients[n], same[n]) for n in same)


def test_objectives_add_up_and_the_teacher_runs_once(build: Any, small: Any) -> None:
    task, model, criterion, _ = build(objectives={"skill": SKILL, "new": {**NEW, "weight": 0.25}})
    ran: list[int] = []
    task.teachers[0].encoder.transformer.layers[2].register_forward_hook(lambda *_: ran.append(3))
    loss, _, log = criterion(model, batch(small))
    per_frame = {name: float(value) / log["frames"] for name, value in log.items()}
    alone = [build(objectives={name: entry}) for name, entry in (("skill", SKILL), ("new", NEW))]
    for _, _, each, _ in alone:
        each.load_state_dict({name: criterion.state_dict()[name] for name in each.state_dict()})
    values = [each(other, batch(small))[0].item() for _, other, each, _ in alone]
    assert ran == [3]
    assert loss.item() == pytest.approx(values[0] + 0.25 * values[1], rel=1e-5)
    assert [per_frame[name] for name in ("skill_loss", "new_loss")] == pytest.approx(values, rel=1e-5)
    assert per_frame["new_loss"] == pytest.approx(per_frame["new_mse"] + 0.5 * per_frame["new_kl"], rel=1e-5)
    assert per_frame["distillation_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_weight_that_falls_with_the_epoch(build: Any, small: Any) -> None:
    """It is saved with the objective and follows fairseq's epoch."""
    entry = {**NEW, "weight": 2.0, "weight_epochs": 4}
    task, model, criterion, cfg = build(objectives={"skill": SKILL, "new": entry})
    assert plain(cfg.objectives.new)["weight_epochs"] == 4 and "weight_epochs" not in plain(cfg.objectives.skill)
    for epoch, weight in ((1, 1.5), (3, 0.5), (4, 0.0), (9, 0.0), (9, 2.0)):
        task.begin_epoch(epoch, model)
        criterion.train(weight != 2.0)  # validation has the whole weight in every epoch
        loss, _, log = criterion(model, batch(small))
        skill, new = (float(log[name]) / log["frames"] for name in ("skill_loss", "new_loss"))
        assert loss.item() == pytest.approx(skill + weight * new, rel=1e-5)


def test_a_new_objective_by_hand(build: Any, small: Any) -> None:
    task, model, criterion, _ = build(objectives={"new": NEW})
    _, _, log = criterion(model, batch(small))
    new, source = criterion.objectives["new"], small.waves()
    with torch.no_grad():
        state = model.speech_encoder(source, transform=new.mask).hidden_states[3]
        states = task.teachers[0].encoder(source).hidden_states
        mse = sum(F.mse_loss(head(state), states[i]) for head, i in zip(new.heads, (2, 3))) / 2
        own, wanted = (
            encoder.tap(source, None, [Tap((3,), "maps")])[0][0].mean(1)
            for encoder in (model.speech_encoder, task.teachers[0].encoder)
        )
        kl = F.kl_div(own.log().flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean")
    assert float(log["new_mse"]) / log["frames"] == pytest.approx(mse.item(), rel=1e-5)
    assert float(log["new_kl"]) / log["frames"] == pytest.approx(kl.item(), rel=1e-4)


def test_padding_changes_nothing(build: Any, small: Any, tmp_path: Path) -> None:
    """The mean over the utterances' frames, if no statistic runs over time."""
    style = {**LARGE_STYLE, "padding_rule": "convolution"}
    for name, seed in (("teacher", 0), ("pupil", 9)):
        save_encoder(random_encoder(seed, **style), tmp_path / f"{name}.safetensors")
    where = {"student": tmp_path / "pupil.safetensors", "teacher": tmp_path / "teacher.safetensors"}
    _, model, criterion, _ = build(**where, objectives={"new": {**NEW, "map_weight": 0.0}})
    waves = [small.waves(length, batch=1, seed=length) for length in (8080, 4560)]
    source, padding = torch.zeros(2, 8080), torch.ones(2, 8080, dtype=torch.bool)
    for row, wave in enumerate(waves):
        source[row, : wave.size(1)], padding[row, : wave.size(1)] = wave[0], False
    with torch.no_grad():
        together = criterion(model, {"net_input": {"source": source, "padding_mask": padding}})
        alone = [criterion(model, {"net_input": {"source": wave}}) for wave in waves]
    frames = [log["frames"] for _, _, log in alone]
    assert together[2]["frames"] == sum(frames) == 25 + 14
    expected = sum(loss.item() * count for (loss, _, _), count in zip(alone, frames)) / sum(frames)
    assert together[0].item() == pytest.approx(expected, rel=1e-4)


class Labels(objective.Objective):
    """Predicts one of two classes from an utterance's mean state, with labels of the batch and no teacher."""

    def __init__(self, cfg: Any, student: Any, teachers: Any, field: str = "criterion") -> None:
        super().__init__(cfg, student, teachers, field)
        self.student_taps = [Tap((2,))]
        self.classify = torch.nn.Linear(student.encoder_embed_dim, 2)

    def forward(self, student: Any, teacher: Any, padding_mask: Any = None, sample: Any = None) -> Any:
        assert teacher == []
        return F.cross_entropy(self.classify(student[0].mean(1)), sample["label"]), {}


@pytest.mark.parametrize("style", ["post", "pre"])
def test_labels_beside_distillation(
    build: Any, small: Any, monkeypatch: pytest.MonkeyPatch, style: str, tmp_path: Path, caplog: Any
) -> None:
    path = tmp_path / "teacher.safetensors"
    save_encoder(random_encoder(**(LARGE_STYLE if style == "pre" else {})), path)
    monkeypatch.setitem(objective.OBJECTIVES, "labels", (Labels, new_objective.HeadsAndMapsConfig))
    objectives = {"label": {"_name": "labels", "weight": 3.0}}
    task, model, criterion, _ = build(student=path, teacher=path, objectives=objectives)
    monkeypatch.setattr(task.teachers[0], "tap", None)  # no tap uses it
    label = torch.tensor([0, 1])
    loss, _, _ = criterion(model, {**batch(small), "label": label})
    state = model.speech_encoder(small.waves()).hidden_states[2].mean(1)
    wanted = F.cross_entropy(criterion.objectives["label"].classify(state), label)
    assert loss.item() == pytest.approx(3 * wanted.item(), rel=1e-5)
    assert re.search(says("criterion.objectives", "layer 3", "up to layer 2"), caplog.text)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize("style", [{}, LARGE_STYLE])
def test_what_a_map_of_the_last_layer_cannot_reach_is_not_trained(build: Any, small: Any, style: dict, tmp_path: Path):
    class Maps(Labels):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.student_taps = [Tap((2,)), Tap((3,), "mean_map")]

        def forward(self, student: Any, teacher: Any, padding_mask: Any = None, sample: Any = None) -> Any:
            return self.classify(student[0]).square().mean() + student[1].square().mean(), {}

    path = tmp_path / "teacher.safetensors"
    save_encoder(random_encoder(**style), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(objective.OBJECTIVES, "labels", (Maps, new_objective.HeadsAndMapsConfig))
        _, model, criterion, _ = build(student=path, teacher=path, objectives={"maps": {"_name": "labels"}})
    criterion(model, batch(small))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    last = {name.split(".")[4] for name, p in model.named_parameters() if p.requires_grad and ".layers.2." in name}
    assert "attention" in last and "ffn" not in last


def test_settings_that_objectives_choose_are_saved(build: Any, tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text("groups: [[0], [3]]\n")
    entry = {"_name": "group_means", "groups_file": str(tmp_path / "groups.yaml"), "weight": 2}
    _, _, criterion, cfg = build(objectives={"skill": entry, "new": {"_name": "heads_and_maps"}})
    saved = plain(cfg.objectives)
    assert (saved["skill"]["groups"], saved["skill"]["groups_file"]) == ([[0], [3]], None)
    assert saved["skill"]["normalize_states"] is False and saved["skill"]["weight"] == 2
    assert saved["new"] == {"_name": "heads_and_maps", "weight": 1.0, "layers": [3], "map_weight": 1.0}
    assert build(objectives=saved)[2].terms[0].objective.groups == ((0,), (3,))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ["criterion.objectives: None"]),
        ({"objectives": {}}, ["criterion.objectives", "{}", "group_means"]),
        ({"objectives": [SKILL]}, ["criterion.objectives"]),
        ({"objectives": {"a": {"groups": [[0]]}}}, ["criterion.objectives.a._name: None", "group_means"]),
        ({"objectives": {"a": {"_name": "other"}}}, ["criterion.objectives.a._name: 'other'", "group_means"]),
        ({"objectives": {"a": 5}}, ["criterion.objectives.a._name"]),
        ({"objectives": {"a": {**SKILL, "weight": -1}}}, ["criterion.objectives.a.weight: -1"]),
        ({"objectives": {"a": {**SKILL, "weight": "much"}}}, ["criterion.objectives.a.weight: 'much'"]),
        ({"objectives": {"a": {**SKILL, "cos": 1.0}}}, ["criterion.objectives.a", "'cos'", "cos_weight"]),
        ({"objectives": {"a": {**SKILL, "l1_weight": "x"}}}, ["criterion.objectives.a", "'x'"]),
        ({"objectives": {"a": {**SKILL, "groups": [[9]]}}}, ["criterion.objectives.a.groups", "layer 9"]),
        ({"objectives": {"a": {**SKILL, "cos_type": "log"}}}, ["criterion.objectives.a.cos_type: 'log'", "log_sig"]),
        ({"objectives": {"a": {**SKILL, "l1_weight": -1.0}}}, ["criterion.objectives.a.l1_weight", -1.0]),
        ({"objectives": {"keys": SKILL}}, ["criterion.objectives.keys", "another"]),
        ({"objectives": {"a-b": SKILL}}, ["criterion.objectives.a-b", "another"]),
        (
            {"objectives": {"a": {**NEW, "layers": [2, 7]}}},
            ["criterion.objectives", "teacher", "layers: [7]", "0 to 3"],
        ),
    ],
)
def test_what_is_refused(build: Any, fields: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        build(**fields)


def test_parameters_of_other_settings_are_refused(build: Any, tmp_path: Path) -> None:
    _, _, criterion, _ = build(objectives={"new": NEW})
    cfg = {"criterion": plain(OmegaConf.to_container(criterion.cfg))}
    torch.save({"criterion": criterion.state_dict(), "cfg": cfg}, tmp_path / "stage1.pt")
    where = str(tmp_path / "stage1.pt")
    said = says("criterion.init_from", "criterion.objectives.new.layers = [2, 3]", "[1, 3]")
    with pytest.raises(ValueError, match=said):
        build(objectives={"new": {**NEW, "layers": [1, 3]}}, init_from=where)


def configure(folder: Path) -> Path:
    """The two tiny recipes with another criterion block."""
    for kind in ("distill", "final"):
        text = (CONFIG / kind / "tiny.yaml").read_text()
        (block,) = re.findall(r"(?ms)^criterion:\n.*?(?=^\w)", text)
        fields = ["_name: distillation", "objectives:", f"  skill: {SKILL}", f"  new: {dict(NEW, weight=1.0)}"]
        fields += re.findall(r"(?m)^  ((?:target_sparsity|sparsity_warmup|init_from): .*)$", block)
        text = text.replace(block, "".join(f"{line}\n" for line in ["criterion:", *(f"  {f}" for f in fields)]))
        (folder / kind).mkdir()
        (folder / kind / "tiny.yaml").write_text(text)
    return folder


@pytest.mark.slow
def test_a_new_objective_in_one_file_through_both_stages(speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    """Prunes, resumes and distils further, with fairseq-hydra-train's program after it imported the file."""
    config = configure(tmp_path)
    program = [sys.executable, str(Path(new_objective.__file__)), "--config-name", "tiny"]
    where = ["hydra.run.dir=.", "checkpoint.save_dir=.", f"task.data={speech}", f"task.teacher={teacher_file}"]
    often = ["common.log_format=json", "common.log_interval=1", "dataset.max_tokens=60000"]
    often += ["criterion.objectives.new.weight=0.5"]

    def train(kind: str, updates: int, *overrides: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        overrides = (*where, *often, *overrides, f"optimization.max_update={updates}")
        log = run([*program, "--config-dir", str(config / kind), *overrides], tmp_path / f"run_{kind}")
        return logged(log, "train_inner"), load_torch_file(tmp_path / f"run_{kind}" / "checkpoint_last.pt")["criterion"]

    first, _ = train("distill", 3, "criterion.target_sparsity=0.2")
    second, state = train("distill", 6, "criterion.target_sparsity=0.2")
    assert [entry["num_updates"] for entry in (*first, *second)] == [1, 2, 3, 4, 5, 6]
    for entry in (*first, *second):
        total = entry["skill_loss"] + 0.5 * entry["new_loss"]
        assert entry["distillation_loss"] == pytest.approx(total, abs=3e-4)
        assert entry["new_loss"] == pytest.approx(entry["new_mse"] + 0.5 * entry["new_kl"], abs=3e-4)
        assert entry["new_kl"] > 0 and "expected_sparsity" in entry
    names = {name.rsplit(".", 1)[0] for name in state if name.startswith("objectives.new.")}
    assert names == {"objectives.new", "objectives.new.heads.0", "objectives.new.heads.1"}
    assert state["objectives.new.mask_emb"].abs().max() > 0  # learned
    start = f"model.init_from={tmp_path / 'run_distill' / 'checkpoint_last.pt'}"
    last, later = train("final", 2, start)
    assert [entry["num_updates"] for entry in last] == [1, 2] and last[0]["loss"] == last[0]["distillation_loss"]
    head = "objectives.new.heads.0.weight"  # loaded: 2 Adam updates change less than a random start
    assert (later[head] - state[head]).abs().max() < 0.01 < state[head].abs().max()
    student = load_encoder(tmp_path / "run_final" / "checkpoint_last.pt")
    assert student.num_parameters() < 0.81 * load_encoder(teacher_file).num_parameters()
    assert student.dropouts == Dropouts() and not any("heads" in name for name in student.state_dict())
