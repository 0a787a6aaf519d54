"""Masking distillation in training: the same frames for student and teachers, learned, resumed, on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from disturbed import Run, same_outcome
from messages import says
from omegaconf import OmegaConf

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.modules.masking import HideFrames
from tests.conftest import random_encoder

SPANS = {"mask_prob": 0.4, "mask_length": 3, "mask_selection": "uniform", "no_mask_overlap": True}
OBJECTIVE = {
    "_name": "layers",
    "l1_weight": 0.0,
    "cos_weight": 0.0,
    "mse_weight": 1.0,
    "layer_weights": {"last": 1.0, "others": 0.1},
    **SPANS,
}


@pytest.fixture(scope="module")
def masked_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher with a mask embedding."""
    path, encoder = tmp_path_factory.mktemp("teacher") / "teacher.safetensors", random_encoder()
    encoder.mask_embedding = torch.randn(32, generator=torch.Generator().manual_seed(5))
    save_encoder(encoder, path)
    return path


def build(small: Any, data: Path, teacher: Path, objectives: Any = None, **task: Any) -> tuple[Any, Any, Any]:
    task = small.make_task(data, teacher, max_sample_size=8000, **task)
    torch.manual_seed(3)
    model = task.build_model(small.student_config(teacher))
    given = objectives or {"a": OBJECTIVE}
    criterion = task.build_criterion(OmegaConf.create({"_name": "distillation", "objectives": given}))
    for parameter in [*criterion.parameters(), model.mask_emb]:
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return task, model, criterion


def batches(task: Any, shards: int = 1) -> list[Any]:
    """Those of each rank's first epoch."""
    task.load_dataset("train")
    data, found = task.dataset("train"), []
    for shard in range(shards):
        iterator = task.get_batch_iterator(data, max_tokens=40000, seed=1, num_shards=shards, shard_id=shard, epoch=1)
        found.append(list(iterator.next_epoch_itr(shuffle=False)))
    return found[0] if shards == 1 else found


@pytest.mark.parametrize("padded", [False, True])
def test_student_and_teacher_hear_the_same_frames(small: Any, speech: Path, masked_teacher: Path, padded: bool) -> None:
    """By hand: the student's masked frames against the unmasked teacher, its other frames against the masked one."""
    task, model, criterion = build(small, speech, masked_teacher, enable_padding=padded)
    model.train(), criterion.train()
    (masking,) = task.maskings
    sample = next(b for b in batches(task) if (b["net_input"].get("padding_mask") is not None) == padded)
    ((asked, mask),) = sample["masked"].items()
    assert asked == masking and mask.any() and not mask.all() and mask.shape[0] == len(sample["files"]) > 1
    loss, _, _ = criterion(model, sample)
    loss.backward()
    teacher, student = task.teachers[0].encoder, model.speech_encoder
    source, padding = sample["net_input"]["source"], sample["net_input"].get("padding_mask")
    assert not torch.equal(teacher.mask_embedding, model.mask_emb)
    with torch.no_grad():
        own = student(source, padding, HideFrames(mask, model.mask_emb))
        whole = teacher(source, padding).hidden_states
        hidden = teacher(source, padding, HideFrames(mask, teacher.mask_embedding)).hidden_states
        counted = torch.ones_like(mask) if own.padding_mask is None else ~own.padding_mask
        wanted = 0.0
        for i, weight, head in zip((1, 2, 3), (0.1, 0.1, 1.0), criterion.objectives["a"].heads):
            target = torch.where(mask[..., None], whole[i], hidden[i])
            wanted += weight * F.mse_loss(head(own.hidden_states[i])[counted], target[counted])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert model.mask_emb.requires_grad and model.mask_emb.grad.abs().max() > 0

    model.eval(), criterion.eval()
    loss, _, _ = criterion(model, {k: v for k, v in sample.items() if k != "masked"})  # as validation has it
    with torch.no_grad():
        states = student(source, padding).hidden_states
        heads = zip((1, 2, 3), (0.1, 0.1, 1.0), criterion.objectives["a"].heads)
        wanted = sum(w * F.mse_loss(head(states[i])[counted], whole[i][counted]) for i, w, head in heads)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_masks_are_the_utterances_own_on_any_number_of_ranks(small: Any, speech: Path, masked_teacher: Path) -> None:
    """They differ in every epoch, and validation has none."""

    def of_files(found: list[Any]) -> dict[str, list[bool]]:
        masks = [(b["files"], *b["masked"].values()) for b in found]
        return {file: mask.tolist() for files, rows in masks for file, mask in zip(files, rows)}

    task, _, _ = build(small, speech, masked_teacher, enable_padding=True)
    one = of_files(batches(task))
    two = of_files([b for rank in batches(task, shards=2) for b in rank])
    assert one.keys() == two.keys() and len(one) == 24
    for file, mask in one.items():  # longer batches only add padding
        length = min(len(mask), len(two[file]))
        assert mask[:length] == two[file][:length] and not any(mask[length:] + two[file][length:])
    data = task.dataset("train")
    data.set_epoch(2)
    iterator = task.get_batch_iterator(data, max_tokens=40000, seed=1, epoch=2)
    assert of_files(list(iterator.next_epoch_itr(shuffle=False))) != one
    task.load_dataset("valid")
    valid = task.get_batch_iterator(task.dataset("valid"), max_tokens=40000, seed=1).next_epoch_itr(shuffle=False)
    assert not any("masked" in sample for sample in valid)


def test_objectives_with_equal_masks_share_a_pass(small: Any, speech: Path, masked_teacher: Path) -> None:
    objectives = {"a": OBJECTIVE, "b": {**OBJECTIVE, "mse_weight": 0.0, "cos_weight": 1.0}}
    task, model, criterion = build(small, speech, masked_teacher, objectives)
    counts = {"teacher": 0, "student": 0}
    for name, encoder in (("teacher", task.teachers[0].encoder), ("student", model.speech_encoder)):

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        encoder.transformer.layers[2].register_forward_hook(count)
    sample = batches(task)[0]
    assert len(sample["masked"]) == 1
    criterion.train()(model.train(), sample)
    assert counts == {"teacher": 2, "student": 1}
    criterion.eval()(model.eval(), {k: v for k, v in sample.items() if k != "masked"})
    assert counts == {"teacher": 3, "student": 2}


def test_a_teacher_without_an_embedding_is_refused_where_it_is_asked_for(
    small: Any, speech: Path, teacher_file: Path
) -> None:
    said = says("task.teacher", teacher_file, "no mask embedding", "criterion.objectives.a", "unmasked_frames=whole")
    with pytest.raises(ValueError, match=said):
        build(small, speech, teacher_file)
    build(small, speech, teacher_file, {"a": {**OBJECTIVE, "unmasked_frames": "whole"}})
    build(small, speech, teacher_file, {"a": {**OBJECTIVE, "unmasked_frames": None}})


def test_a_student_without_masks_does_not_learn_its_embedding(small: Any, speech: Path, masked_teacher: Path) -> None:
    """It starts as the teacher's if the projection is copied."""
    plain = {name: value for name, value in OBJECTIVE.items() if name not in SPANS}
    task = small.make_task(speech, masked_teacher)
    model = task.build_model(small.student_config(masked_teacher))
    task.build_criterion(OmegaConf.create({"_name": "distillation", "objectives": {"a": plain}}))
    assert torch.equal(model.mask_emb, load_encoder(masked_teacher).mask_embedding) and not model.mask_emb.requires_grad
    parts = small.student_config(masked_teacher, init_parts=["conv"])
    assert not torch.equal(task.build_model(parts).mask_emb, model.mask_emb)
    with pytest.raises(ValueError, match=says("sample", "masked", 0, 1)):
        task, model, criterion = build(small, speech, masked_teacher)
        criterion.train()(model, {"net_input": {"source": small.waves()}})


SETTINGS = [
    *("common.log_format=json", "common.log_interval=1", "dataset.max_tokens=40000"),
    *("dataset.validate_interval_updates=0", "checkpoint.save_interval_updates=3", "optimization.max_update=8"),
    *("task.max_sample_size=9000", "model.dropout=0.1", "model.attention_dropout=0.1", "task.crop_multiple=1"),
    *("model.encoder_layers=3", "model.dropout_input=0.1", "criterion.objectives.states.unmasked_frames=masked"),
]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_masked_run_goes_on_bit_for_bit(speech: Path, masked_teacher: Path, tmp_path: Path, world_size: int) -> None:
    where = (f"task.data={speech}", f"task.teacher={masked_teacher}")
    config = ("distill", "tiny_maskhubert", SETTINGS)
    straight = Run(tmp_path / "straight", *where, world_size=world_size, config=config).finish()
    run = Run(tmp_path / "killed", *where, world_size=world_size, config=config)
    run.start()
    run.wait_for(lambda: run.last_update() >= 4)
    run.kill()
    run.finish()
    same_outcome(run, straight)
