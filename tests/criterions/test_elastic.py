"""Elastic training: the loss of an update, validation, real runs of both stages, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from omegaconf import OmegaConf
from runs import logged, run, script, train

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.pruning.elastic import ElasticConstraint, NestedSizes

GROUPS = [[0], [1, 2], [3]]
SIZES = {"smallest": 0.45, "largest": 0.7}
ELASTIC = {"elastic": SIZES, "constraint": "exact", "groups": GROUPS, "sparsity_warmup": 0}
GATED = {"pruning_units": ["conv", "heads", "ffn"]}


@pytest.fixture
def build(small: Any, speech: Path, teacher_file: Path) -> Any:
    """Builds (task, model, criterion) of stage 1."""

    def make(model: dict = GATED, **fields: Any) -> tuple:
        task = small.make_task(speech, teacher_file)
        student = task.build_model(small.student_config(teacher_file, **model))
        criterion = task.build_criterion(OmegaConf.create({"_name": "skill_group_kd", **ELASTIC, **fields}))
        return task, student, criterion

    return make


def test_an_update_is_the_mean_over_its_sizes_and_the_teacher_runs_once(build: Any, small: Any) -> None:
    task, model, criterion = build()
    constraint, encoder = criterion.constraint, model.speech_encoder
    assert isinstance(constraint, ElasticConstraint) and not isinstance(constraint, NestedSizes)
    constraint.impose(encoder, 0)
    ran: list[int] = []
    task.teachers[0].encoder.transformer.layers[2].register_forward_hook(lambda *_: ran.append(1))
    batch = {"net_input": {"source": small.waves()}}
    loss, _, log = criterion(model.train(), batch)
    assert ran == [1]
    frames, alone = log["frames"], []
    for size in constraint.sizes_at(0, model.cfg.seed):
        model.set_num_updates(0)
        draw = model.draw_gates(constraint.log_alpha(encoder, size, 0))
        found = criterion._hear(model, batch["net_input"], batch, draw, _teacher(task, criterion, batch), {})
        alone.append(found.loss.item())
    assert len(alone) == 3 and len(set(alone)) == 3
    assert loss.item() == pytest.approx(sum(alone) / 3, rel=1e-6)
    said = {name: float(value) / frames for name, value in log.items() if name.startswith("distillation_loss")}
    assert said == pytest.approx(
        {"distillation_loss": loss.item(), "distillation_loss_at_0.7": alone[0], "distillation_loss_at_0.45": alone[1]}
    )
    loss.backward()
    gradient = encoder.gates.log_alpha.grad
    assert gradient.abs().max() > 0 and abs(gradient.sum()) < 1e-4 * gradient.abs().sum()
    _, _, log = criterion.eval()(model.eval(), batch)
    assert {name for name in log if "_at_" in name} == {f"distillation_loss_at_{size}" for size in (0.45, 0.575, 0.7)}


def _teacher(task: Any, criterion: Any, batch: dict) -> dict:
    taps = criterion.teacher_taps
    return dict(zip(taps, task.teachers[0].tap(batch["net_input"]["source"], None, taps, {})))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"constraint": "lagrangian"}, ("criterion.constraint", "lagrangian", "exact")),
        ({"target": {"macs": 0.2}}, ("criterion.target", "criterion.elastic", "null")),
        ({"target_sparsity": 0.75}, ("criterion.target_sparsity", 0.75, "criterion.elastic")),
        ({"elastic": {"smallest": 0.01, "largest": 0.5}}, ("criterion.elastic.smallest", "cannot be reached")),
        ({"elastic": {"smallest": 0.6, "largest": 0.5}}, ("criterion.elastic.smallest", 0.6, "largest=0.5")),
        ({"model": {}}, ("criterion.elastic", "no gates", "model.nested=true")),
        ({"model": {"nested": True}}, ("model.nested", "model.init_from", "criterion.elastic")),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, fields: dict, said: tuple) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        build(**fields)


NAME = "tiny_elastic"
RUN = (
    *("criterion.groups=[[0],[1,2],[3]]", "dataset.max_tokens=60000"),
    *("criterion.elastic.smallest=0.45", "criterion.elastic.largest=0.7"),
    *("common.log_interval=1", "common.log_format=json"),
)


def weights(folder: Path) -> dict[str, Any]:
    checkpoint = load_torch_file(folder / "checkpoint_last.pt")
    return {**checkpoint["model"], **checkpoint["criterion"]}


def same(folder: Path, other: Path) -> bool:
    found, wanted = weights(folder), weights(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_both_stages_resume_bit_for_bit_and_every_size_is_cut(
    speech: Path, teacher_file: Path, tmp_path: Path, precision: str
) -> None:
    if precision == "bf16" and not hasattr(torch, "get_autocast_dtype"):
        pytest.skip("torch < 2.4 lacks half-precision kernels for the CPU")
    common = [*RUN, f"task.data={speech}", f"task.teacher={teacher_file}"]
    common.append(f"common.bf16={str(precision == 'bf16').lower()}")
    schedules = [f"optimizer.groups.{name}.lr_scheduler.total_num_update=4" for name in ("default", "gates")]
    stages = {"distill": [*schedules, "criterion.sparsity_warmup=1"], "final": ["+lr_scheduler.total_num_update=4"]}
    for kind, more in stages.items():
        once, twice = tmp_path / f"{kind}-once", tmp_path / f"{kind}-twice"
        if kind == "final":
            more = [*more, f"model.init_from={tmp_path / 'distill-once' / 'checkpoint_last.pt'}"]
        log = train(once, kind, *common, *more, "optimization.max_update=3", name=NAME)
        valid = logged(log, "valid")[-1]
        assert {"distillation_loss_at_0.7", "distillation_loss_at_0.575", "distillation_loss_at_0.45"} <= set(valid)
        expected = [entry["expected_sparsity"] for entry in logged(log, "train_inner")][1:]
        assert expected == pytest.approx([0.3] * 2, abs=1e-4 if kind == "distill" else 5e-3)  # cut to whole units
        for updates in (2, 3):
            train(twice, kind, *common, *more, f"optimization.max_update={updates}", name=NAME)
        assert same(once, twice)
        last = once / "checkpoint_last.pt"
        assert read_source(last).provenance["elastic"]["largest"] == 0.7
        command = ["skill-shrink", str(last), "small.safetensors", *"--size 0.7 --size 0.5 --size 0.45".split()]
        run(command, once)
        sizes = [load_encoder(once / f"small-{size}.safetensors").num_parameters() for size in (0.7, 0.5, 0.45)]
        full = load_encoder(teacher_file).num_parameters()
        assert [size / full for size in sizes] == pytest.approx([0.7, 0.5, 0.45], abs=3e-3)
    assert load_encoder(tmp_path / "final-once" / "checkpoint_last.pt").num_parameters() == sizes[0]


@pytest.mark.slow
def test_two_ranks_hear_the_same_sizes(speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    """Both backends, both stages: two ranks have equal gates and weights, and the sizes of a single rank."""
    source = """
import json, os
import torch
import fairseq_cli.hydra_train, fairseq_cli.train, skill_fairseq
from skill_fairseq.pruning.elastic import ElasticConstraint

asked, sizes_at = [], ElasticConstraint.sizes_at
ElasticConstraint.sizes_at = lambda *args: (found := sizes_at(*args), asked.append(found))[0]

class Trainer(fairseq_cli.train.Trainer):
    def train_step(self, samples, raise_oom=False):
        result = super().train_step(samples, raise_oom)
        model = self.get_model()
        sums = [float(p.detach().double().sum()) for p in model.parameters()]
        with open("rank" + os.environ["RANK"] + ".json", "w") as file:
            json.dump({"asked": asked, "sums": sums, "ids": samples[0]["id"].tolist()}, file)
        return result

fairseq_cli.train.Trainer = Trainer
fairseq_cli.hydra_train.cli_main()
"""
    common = [*RUN, f"task.data={speech}", f"task.teacher={teacher_file}", "optimization.max_update=2"]
    common += ["distributed_training.distributed_backend=gloo", "distributed_training.distributed_world_size=2"]
    more: list[str] = ["distributed_training.ddp_backend=pytorch_ddp"]
    for kind in ("distill", "final"):
        folder = tmp_path / kind
        train(folder, kind, *common, *more, launcher=script(folder, source, 2), name=NAME)
        first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
        assert first["ids"] != second["ids"]
        assert first["asked"] == second["asked"] and len(first["asked"]) == 2
        assert first["sums"] == second["sums"]
        more = [f"model.init_from={folder / 'checkpoint_last.pt'}"]
