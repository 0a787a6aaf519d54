"""Fields of the distillation task: each has an effect, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import says
from omegaconf import OmegaConf

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.files import content_sha256
from skill_fairseq.tasks.skill_distillation import SkillDistillationTask


def loaded(small: Any, data: Path, **fields: Any) -> Any:
    task = small.make_task(data, **fields)
    task.load_dataset("train")
    return task


def batches(task: Any, **settings: Any) -> list[dict[str, Any]]:
    return list(task.get_batch_iterator(task.dataset("train"), **{"max_tokens": 60000, **settings}).next_epoch_itr())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("crop_multiple", 0, "at least 1"),
        ("max_sample_size", -1, "at least 1"),
        ("min_sample_size", -5, "at least 0"),
        ("num_batch_buckets", -1, "at least 0"),
        ("max_unreadable_files", -1, "at least 0"),
        ("max_skipped_updates", -1, "at least 0"),
        ("sample_rate", 0, "at least 1"),
        ("labels", "ltr", "does nothing"),
        ("binarized_dataset", True, "does nothing"),
        ("precompute_mask_indices", True, "does nothing"),
        ("tpu", True, "does nothing"),
        ("text_compression_level", "low", "does nothing"),
    ],
)
def test_what_is_refused_before_anything_is_read(
    small: Any, speech: Path, teacher_file: Path, field: str, value: Any, expected: str
) -> None:
    task = small.make_task(speech, teacher_file, **{field: value})
    for start in (lambda: task.load_dataset("train"), lambda: task.build_model(small.student_config(teacher_file))):
        with pytest.raises(ValueError, match=says(f"task.{field}", value, expected)):
            start()


def test_crops_must_be_long_enough_for_the_student(small: Any, speech: Path, teacher_file: Path) -> None:
    task = small.make_task(speech, teacher_file, max_sample_size=399)
    with pytest.raises(ValueError, match=says("task.max_sample_size", 399, "at least 400")):
        task.build_model(small.student_config(teacher_file))


def test_subsets_that_are_not_there_are_named(small: Any, speech: Path) -> None:
    task = small.make_task(speech)
    with pytest.raises(FileNotFoundError, match=says("dataset.valid_subset", "dev.tsv")):
        task.load_dataset("dev")
    with pytest.raises(FileNotFoundError, match=says("dataset.train_subset", "other.tsv")):
        task.load_dataset("other", data_selector=None)  # like fairseq's trainer requests its training data


def test_training_data_may_have_another_name(small: Any, speech: Path) -> None:
    task = small.make_task(speech, max_sample_size=8000)
    task.load_dataset("valid", data_selector=None)
    task.datasets["train"] = task.dataset("valid")
    assert all("padding_mask" not in b["net_input"] and b["net_input"]["source"].size(1) <= 8000 for b in batches(task))


def test_batches_that_hold_no_utterance_are_refused_by_name(small: Any, speech: Path) -> None:
    task = loaded(small, speech, max_sample_size=16000)
    with pytest.raises(ValueError, match=says("dataset.max_tokens", 4000, min(task.dataset("train").sizes))):
        batches(task, max_tokens=4000, max_positions=(4000, 4000), ignore_invalid_inputs=True)


def test_buckets_leave_few_lengths(small: Any, speech: Path) -> None:
    task, any_length = (loaded(small, speech, max_sample_size=16000, num_batch_buckets=n) for n in (3, 0))
    dataset = task.dataset("train")
    sizes = np.minimum(dataset.sizes, 16000)
    lengths = {batch["net_input"]["source"].size(1) for batch in batches(task)}
    assert 2 <= len(lengths) <= 3 < len({b["net_input"]["source"].size(1) for b in batches(any_length)})
    assert min(lengths) == sizes.min()
    for batch in batches(task):
        source, longest = batch["net_input"]["source"], sizes[batch["id"].numpy()].min()
        assert source.size(1) == max(n for n in dataset._buckets if n <= longest) and source.numel() <= 60000
    ids = [sorted(i for batch in batches(task, epoch=e) for i in batch["id"].tolist()) for e in (1, 2)]
    assert ids[0] == ids[1] == list(range(24))
    first, second = ({frozenset(b["id"].tolist()) for b in batches(task, epoch=e)} for e in (1, 2))
    assert first != second


def test_training_batches_may_be_padded(small: Any, speech: Path) -> None:
    task = loaded(small, speech, enable_padding=True, max_sample_size=16000)
    dataset, padded = task.dataset("train"), 0
    for batch in batches(task):
        source, mask = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
        lengths = np.minimum(dataset.sizes[batch["id"].numpy()], 16000)
        assert source.size(1) == lengths.max() and source.numel() <= 60000
        if mask is not None:
            padded += 1
            assert (~mask).sum(1).tolist() == lengths.tolist() and not source[mask].any()
    assert padded
    with pytest.raises(ValueError, match=says("task.crop_multiple", 4000, "task.enable_padding")):
        loaded(small, speech, enable_padding=True, crop_multiple=4000)


def test_padded_batches_come_in_few_lengths_too(small: Any, speech: Path) -> None:
    task = loaded(small, speech, enable_padding=True, num_batch_buckets=3)
    found = batches(task)
    assert len({batch["net_input"]["source"].size(1) for batch in found}) <= 3
    for batch in found:
        lengths = task.dataset("train").sizes[batch["id"].numpy()]
        assert (~batch["net_input"]["padding_mask"]).sum(1).tolist() == lengths.tolist()


def test_teacher_of_another_sample_rate_is_refused(
    small: Any, speech: Path, teacher_file: Path, tmp_path: Path
) -> None:
    telephone = tmp_path / "telephone.safetensors"
    save_encoder(small.random_encoder(sample_rate=8000), telephone)
    with pytest.raises(ValueError, match=says("task.sample_rate: 16000", 8000, "task.sample_rate=8000")):
        _ = small.make_task(speech, telephone).teachers
    task = small.make_task(speech, telephone, sample_rate=8000)
    assert task.teachers[0].config.sample_rate == 8000
    with pytest.raises(ValueError, match=says("task.sample_rate: 8000", "model.init_from", 16000)):
        task.build_model(small.student_config(teacher_file))


def test_student_keeps_the_sample_rate_in_its_config(small: Any, speech: Path, tmp_path: Path) -> None:
    telephone = tmp_path / "telephone.safetensors"
    save_encoder(small.random_encoder(sample_rate=8000), telephone)
    task, cfg = small.make_task(speech, telephone, sample_rate=8000), small.student_config(telephone)
    model = task.build_model(cfg)
    assert model.speech_encoder.config.sample_rate == cfg.sample_rate == 8000
    again = small.make_task(speech).build_model(cfg, from_checkpoint=True)
    assert again.speech_encoder.config == model.speech_encoder.config
    del cfg["sample_rate"]  # for a checkpoint without it; the task's config has it
    old = small.make_task(speech, sample_rate=8000).build_model(cfg, from_checkpoint=True)
    assert old.speech_encoder.config.sample_rate == 8000


@pytest.mark.parametrize("given", [[], [None], ["a.pt", 0.5], ["a.pt", ""], True, {"a": "b"}])
def test_teachers_are_paths(given: Any, small: Any, speech: Path) -> None:
    with pytest.raises(ValueError, match=says("task.teacher", str(given), "list of paths")):
        SkillDistillationTask(OmegaConf.merge(small.make_task(speech).cfg, {"teacher": given}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_rate": 8000}, ["sample_rate", 8000, 16000]),
        ({"normalize": True}, ["normalize", "True", "False"]),
        ({"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)]"}, ["samples per frame", 160, 320]),
        ({"conv_feature_layers": "[(8,12,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2"}, ["first frame", 402, 400]),
    ],
)
def test_several_teachers_hear_the_same(
    changes: dict, said: list, small: Any, speech: Path, teacher_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_encoder(small.random_encoder(**changes), other)
    task = small.make_task(speech)
    task.cfg.teacher = [str(teacher_file), str(other)]
    with pytest.raises(ValueError, match=says("task.teacher", other.name, teacher_file.name, *said)):
        _ = task.teachers
    assert task.teacher_sha256() == f"{content_sha256(teacher_file)}, {content_sha256(other)}"
    task.cfg.teacher = [str(teacher_file), str(tmp_path / "none.pt")]
    with pytest.raises(FileNotFoundError, match=says("task.teacher", "none.pt")):
        _ = task.teachers
