"""The distillation task: data, teacher, and refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from messages import says
from runs import run, script

from skill_fairseq.audio.manifest import write_manifest
from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.modules.taps import Tap

MAX_TOKENS = 60000


def batches(task: Any, split: str, epoch: int = 1, seed: int = 1, shuffle: bool = True) -> list[dict[str, Any]]:
    iterator = task.get_batch_iterator(task.dataset(split), max_tokens=MAX_TOKENS, seed=seed, epoch=epoch)
    return list(iterator.next_epoch_itr(shuffle=shuffle))


def members(found: list[dict[str, Any]]) -> set[frozenset[int]]:
    return {frozenset(batch["id"].tolist()) for batch in found}


@pytest.fixture
def task(small: Any, speech: Path) -> Any:
    task = small.make_task(speech, max_sample_size=16000, min_sample_size=4000)
    task.load_dataset("train")
    task.load_dataset("valid")
    return task


def test_relative_root_from_any_working_directory(
    small: Any, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(speech, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    task = small.make_task("moved")
    task.load_dataset("train")
    sample = task.dataset("train")[3]
    wave, _ = soundfile.read(str(moved / "train" / "3.wav"), dtype="float32")
    assert sample["id"] == 3 and np.array_equal(sample["source"].numpy(), wave)


def test_every_epoch_has_batches_of_its_own(task: Any) -> None:
    first, second = members(batches(task, "train", epoch=1)), members(batches(task, "train", epoch=2))
    assert len(first) > 3 and first != second
    for found in (first, second):  # every utterance once
        assert sorted(i for batch in found for i in batch) == list(range(24))


def test_seed_and_epoch_fix_the_batches(small: Any, speech: Path, task: Any) -> None:
    again = small.make_task(speech, max_sample_size=16000, min_sample_size=4000)
    again.load_dataset("train")
    np.random.seed(77)  # the state of the global generator does not matter
    for epoch in (3, 1):
        ids = [batch["id"].tolist() for batch in batches(task, "train", epoch)]
        assert ids == [batch["id"].tolist() for batch in batches(again, "train", epoch)]
    assert members(batches(task, "train", 3)) != members(batches(task, "train", 3, seed=2))


def test_training_batches_hold_utterances_of_like_length_cropped_to_the_shortest(task: Any) -> None:
    sizes = np.minimum(task.dataset("train").sizes, 16000)
    wasted = total = 0
    for batch in batches(task, "train"):
        source, lengths = batch["net_input"]["source"], sizes[batch["id"].numpy()]
        assert "padding_mask" not in batch["net_input"]
        assert source.size(1) == lengths.min() and source.numel() <= MAX_TOKENS
        total, wasted = total + lengths.sum(), wasted + (lengths - lengths.min()).sum()
    assert wasted / total < 0.2
    shapes = [batch["net_input"]["source"].shape for batch in batches(task, "train")]
    assert task.dataset("train").num_batches == len(shapes)
    assert sorted(task.dataset("train").heard) == sorted(samples for rows, samples in shapes for _ in range(rows))


def test_crops_come_from_all_over_the_utterance(small: Any, tmp_path: Path) -> None:
    data = small.write_speech(tmp_path / "data", {"train": [1.0]})
    ramp = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    soundfile.write(str(data / "train" / "0.wav"), ramp, 16000, subtype="FLOAT")
    task = small.make_task(data, max_sample_size=4000)
    task.load_dataset("train")
    dataset = task.dataset("train")
    starts = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        source = dataset.collater([dataset[0]])["net_input"]["source"][0].numpy()
        start = int(np.searchsorted(ramp, source[0]))
        assert np.array_equal(source, ramp[start : start + 4000])
        starts.append(start)
    assert min(starts) < 3000 and max(starts) > 9000


@pytest.mark.parametrize(
    ("lengths", "multiple", "expected"),
    [((9000, 11000), 4000, 8000), ((8000, 9000), 4000, 8000), ((3000, 9000), 4000, 3000), ((9001, 9500), 1, 9001)],
)
def test_crop_multiple(small: Any, speech: Path, lengths: tuple, multiple: int, expected: int) -> None:
    task = small.make_task(speech, crop_multiple=multiple)
    task.load_dataset("train")
    samples = [{"id": i, "file": f"{i}.wav", "source": torch.ones(length)} for i, length in enumerate(lengths)]
    assert task.dataset("train").collater(samples)["net_input"]["source"].shape == (2, expected)


def test_validation_sees_whole_utterances_without_padding(small: Any, tmp_path: Path) -> None:
    lengths = [0.5, 0.9, 0.5, 1.3, 0.9, 0.5, 0.5]
    task = small.make_task(
        small.write_speech(tmp_path, {"valid": lengths}), max_sample_size=5000, min_sample_size=9000, crop_multiple=4000
    )
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    for max_tokens, expected in ((16000, [[0, 2], [5, 6], [1], [4], [3]]), (60000, [[0, 2, 5, 6], [1, 4], [3]])):
        iterator = task.get_batch_iterator(dataset, max_tokens=max_tokens, seed=1, epoch=1)
        found = list(iterator.next_epoch_itr(shuffle=False))
        assert [batch["id"].tolist() for batch in found] == expected
        for batch in found:
            assert batch["net_input"]["padding_mask"] is None
            for row, index in zip(batch["net_input"]["source"], batch["id"].tolist()):
                assert torch.equal(row, dataset[index]["source"])
    iterator = task.get_batch_iterator(dataset, max_tokens=60000, max_sentences=3)
    assert [len(batch) for batch in iterator.frozen_batches] == [3, 1, 2, 1]


def test_a_file_that_is_longer_than_the_manifest_says_pads_the_others(small: Any, speech: Path) -> None:
    task = small.make_task(speech)
    task.load_dataset("valid")
    samples = [task.dataset("valid")[i] for i in (0, 1)]
    lengths = [len(sample["source"]) for sample in samples]
    mask = task.dataset("valid").collater(samples)["net_input"]["padding_mask"]
    assert lengths[0] != lengths[1] and torch.equal((~mask).sum(1), torch.tensor(lengths))


def test_validation_utterances_may_be_longer_than_a_batch(small: Any, tmp_path: Path) -> None:
    task = small.make_task(small.write_speech(tmp_path, {"valid": [0.5, 3.0, 5.0, 0.5]}))
    task.load_dataset("valid")
    iterator = task.get_batch_iterator(task.dataset("valid"), max_tokens=20000).next_epoch_itr(shuffle=False)
    assert sorted(i for batch in iterator for i in batch["id"].tolist()) == [0, 1, 2, 3]


def test_normalised_audio_has_zero_mean_and_unit_variance(small: Any, speech: Path) -> None:
    task = small.make_task(speech, normalize=True)
    task.load_dataset("valid")
    wave = task.dataset("valid")[0]["source"]
    assert abs(wave.mean()) < 1e-5 and wave.std(unbiased=False).item() == pytest.approx(1, abs=2e-3)


def broken(tmp_path: Path, small: Any, wave: Any, rate: int = 16000) -> Any:
    """A task whose second training file is replaced by this audio."""
    data = small.write_speech(tmp_path / "data", {"train": [0.5, 0.5]})
    soundfile.write(str(data / "train" / "1.wav"), wave, rate, subtype="FLOAT")
    task = small.make_task(data)
    task.load_dataset("train")
    return task.dataset("train")


def test_audio_that_cannot_be_used_is_named(tmp_path: Path, small: Any) -> None:
    wave = small.tone(0.5, 0)
    bad = wave.copy()
    bad[123] = np.nan
    for name, samples, rate, *said in (
        ("nan", bad, 16000, "1 samples", "NaN", 123),
        ("rate", wave, 8000, "8000 Hz", "16000 Hz"),
        ("short", wave[:200], 16000, "200 samples", 400),
        ("stereo", np.stack([wave, wave], 1), 16000, "2 channels"),
    ):
        dataset = broken(tmp_path / name, small, samples, rate)
        samples = [dataset[0], dataset[1]]
        batch = dataset.collater(samples)
        assert batch["id"].tolist() == [0] and batch["net_input"]["source"].shape == (1, 8000)
        assert batch["files"] == [str(tmp_path / name / "data" / "train" / "0.wav")]
        (problem,) = batch["unreadable"]
        assert re.search(says(tmp_path / name / "data" / "train" / "1.wav", *said), problem)
        assert set(dataset.collater(samples[1:])) == {"unreadable"}


def test_missing_files_are_an_error_before_training(tmp_path: Path, small: Any) -> None:
    data = small.write_speech(tmp_path / "data", {"train": [0.5, 0.5, 0.5]})
    (data / "train" / "2.wav").unlink()
    with pytest.raises(FileNotFoundError, match=says("train.tsv", "1 of 3", "missing", "train/2.wav")):
        small.make_task(data).load_dataset("train")
    with pytest.raises(FileNotFoundError, match=says("valid.tsv", "skill-manifest")):
        small.make_task(data).load_dataset("valid")


def test_a_sample_of_the_files_is_looked_for_or_all(
    tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a thousand for any corpus, which still detects a wrong root."""
    names = [f"{i}.wav" for i in range(5000)]
    looked: list[str] = []
    missing = {"4711.wav"}

    def isfile(path: Any) -> bool:
        looked.append(Path(path).name)
        return Path(path).name not in missing

    monkeypatch.setattr("skill_fairseq.audio.manifest.os.path.isfile", isfile)
    write_manifest(tmp_path / "train.tsv", "/corpus", names, [8000] * 5000)
    small.make_task(tmp_path).load_dataset("train")
    assert len(looked) == len(set(looked)) == 1000
    looked.clear()
    with pytest.raises(FileNotFoundError, match=says("train.tsv", "1 of 5000", "missing", "4711.wav")):
        small.make_task(tmp_path, check_all_files=True).load_dataset("train")
    assert looked == names
    missing.update(names)
    with pytest.raises(FileNotFoundError, match=says("1000 of 1000", 5000, "/corpus")):
        small.make_task(tmp_path).load_dataset("train")


LOOK = """
import os, torch
from skill_fairseq.audio import manifest
from skill_fairseq.tasks.speech_dataset import check_once

torch.distributed.init_process_group("gloo")
looked, isfile = [], os.path.isfile
manifest.os.path.isfile = lambda path: looked.append(path) or isfile(path)
for name in ("whole", "short"):
    found = manifest.read_manifest(name + ".tsv")
    looked.clear()
    try:
        check_once(found)
        error = "nothing"
    except FileNotFoundError as missing:
        error = str(missing)
    print(f"{name}, rank {torch.distributed.get_rank()}: looked for {sum('.wav' in str(p) for p in looked)}: {error}")
torch.distributed.barrier()  # a rank whose peer is gone aborts at its own end
torch.distributed.destroy_process_group()
"""


def test_the_first_rank_looks_for_files_and_every_rank_hears_of_it(tmp_path: Path) -> None:
    for name in ("0.wav", "1.wav"):
        (tmp_path / name).touch()
    write_manifest(tmp_path / "whole.tsv", ".", ["0.wav", "1.wav"], [8000, 8000])
    write_manifest(tmp_path / "short.tsv", ".", ["0.wav", "1.wav", "2.wav"], [8000] * 3)
    log = run([*script(tmp_path, LOOK, 2)], tmp_path)
    for rank in (0, 1):
        assert f"whole, rank {rank}: looked for {(2, 0)[rank]}: nothing" in log
        (told,) = re.findall(rf"short, rank {rank}: looked for {(3, 0)[rank]}: (.*)", log)
        assert re.search(says("short.tsv", "1 of 3", "missing", "2.wav"), told)


def test_nothing_long_enough_is_an_error(speech: Path, small: Any) -> None:
    with pytest.raises(ValueError, match=says("train.tsv", "no utterance", "task.min_sample_size=99999")):
        small.make_task(speech, min_sample_size=99999).load_dataset("train")


def test_teacher_is_loaded_when_first_asked_for(speech: Path, small: Any, teacher_file: Path) -> None:
    task = small.make_task(speech, speech / "no_such_teacher.pt")
    task.load_dataset("train")
    with pytest.raises(FileNotFoundError, match="no_such_teacher"):
        _ = task.teachers
    with pytest.raises(ValueError, match=says("task.teacher")):
        _ = small.make_task(speech).teachers
    task = small.make_task(speech, teacher_file)
    assert task.teachers is task.teachers


def test_teacher_is_frozen_and_outside_of_everything(speech: Path, small: Any, teacher_file: Path) -> None:
    task = small.make_task(speech, teacher_file)
    model = task.build_model(small.student_config(teacher_file, pruning_units=["ffn"]))
    criterion = small.make_criterion(task, groups=[[0], [1, 2, 3]], target_sparsity=0.1)
    model.train()
    criterion.train()
    teacher = task.teachers[0].encoder
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    loss, _, _ = criterion(model, {"net_input": {"source": small.waves()}})
    loss.backward()
    assert not teacher.training and not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    held = {id(p) for module in (model, criterion) for p in module.parameters()}
    assert held.isdisjoint(id(p) for p in teacher.parameters())
    assert not any(m is teacher for module in (model, criterion) for m in module.modules())
    projection = {f"projections.projections.0.{n}" for n in ("weight", "bias")}
    assert set(criterion.state_dict()) == projection | {"constraint.lambda1", "constraint.lambda2"}
    assert not task.state_dict()


def test_teacher_of_another_normalisation_is_refused(
    speech: Path, small: Any, teacher_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says("task.normalize: True", "teacher", "task.normalize=false")):
        _ = small.make_task(speech, teacher_file, normalize=True).teachers
    save_encoder(small.random_encoder(normalize=True), tmp_path / "normalised.safetensors")
    with pytest.raises(ValueError, match=says("task.normalize: False", "teacher", "task.normalize=true")):
        _ = small.make_task(speech, tmp_path / "normalised.safetensors").teachers


def test_teacher_runs_in_float32_up_to_the_deepest_group(speech: Path, small: Any, teacher_file: Path) -> None:
    teacher = small.make_task(speech, teacher_file).teachers[0]
    source = small.waves()
    with torch.no_grad():
        states = small.random_encoder()(source.half().float()).hidden_states
    taps = [Tap((0, 2)), Tap((1,))]
    low, high = teacher.tap(source.half(), None, taps)
    assert low.dtype == torch.float32
    assert torch.allclose(low, (states[0] + states[2]) / 2) and torch.allclose(high, states[1])
    ran: list[int] = []
    for i, layer in enumerate(teacher.encoder.transformer.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    teacher.tap(source, None, taps)
    assert ran == [0, 1]


def test_examples_manifests_have_their_audio(small: Any) -> None:
    data = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"
    task = small.make_task(data)
    for split in ("train", "valid"):
        task.load_dataset(split)
        dataset = task.dataset(split)
        longest = int(np.argmax(dataset.sizes))
        assert len(dataset[longest]["source"]) == dataset.sizes[longest]


def test_long_recordings_are_cut_in_validation_and_named(
    small: Any, speech: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def valid(limit: Any) -> Any:
        task = small.make_task(speech, max_valid_sample_size=limit)
        task.load_dataset("valid")
        return task

    whole = valid(None).dataset("valid")
    lengths = [len(whole[i]["source"]) for i in range(len(whole))]
    limit = sorted(lengths)[3]  # two are longer

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert not warnings()
    task = valid(limit)
    (warning,) = warnings()
    longer = [i for i, length in enumerate(lengths) if length > limit]
    assert len(longer) == 2 and "2 recordings" in warning
    assert all(str(speech / "valid" / f"{i}.wav") in warning for i in longer)
    assert f"task.max_valid_sample_size={limit}" in warning
    cut = task.dataset("valid")
    for i, length in enumerate(lengths):
        assert cut.size(i) == min(length, limit)
        assert torch.equal(cut[i]["source"], whole[i]["source"][:limit])  # the beginning each time
    heard = [batch["net_input"]["source"].size(1) for batch in batches(task, "valid", shuffle=False)]
    assert max(heard) == limit
    task.load_dataset("train")
    assert max(task.dataset("train").sizes) > limit and len(warnings()) == 1  # training has its own limit
    with pytest.raises(ValueError, match=says("task.max_valid_sample_size: 0")):
        valid(0)


def test_validation_has_a_limit_unless_it_is_lifted(small: Any, speech: Path) -> None:
    assert small.make_task(speech).cfg.max_valid_sample_size == 60 * 16000
