"""The distillation task: its data, its teacher, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from skill_fairseq.checkpoints import save_encoder

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


def test_validation_sees_whole_utterances_with_padding_mask(small: Any, speech: Path) -> None:
    task = small.make_task(speech, max_sample_size=5000, min_sample_size=9000, crop_multiple=4000)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    found = batches(task, "valid", shuffle=False)
    assert [i for batch in found for i in batch["id"].tolist()] == list(range(6))
    for batch in found:
        source, mask = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
        for row, index in enumerate(batch["id"].tolist()):
            wave = dataset[index]["source"]
            assert torch.equal(source[row, : len(wave)], wave) and not source[row, len(wave) :].any()
            assert torch.equal(mask[row], torch.arange(source.size(1)) >= len(wave))
    equal = dataset.collater([dataset[2], dataset[2]])
    assert equal["net_input"]["padding_mask"] is None


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
    for name, samples, rate, message in (
        ("nan", bad, 16000, "1 samples are NaN or infinite, the first at 123"),
        ("rate", wave, 8000, "sample rate 8000 Hz, expected 16000 Hz"),
        ("short", wave[:200], 16000, "200 samples, expected at least 400"),
        ("stereo", np.stack([wave, wave], 1), 16000, "2 channels, expected 1"),
    ):
        dataset = broken(tmp_path / name, small, samples, rate)
        samples = [dataset[0], dataset[1]]
        batch = dataset.collater(samples)
        assert batch["id"].tolist() == [0] and batch["net_input"]["source"].shape == (1, 8000)
        assert batch["files"] == [str(tmp_path / name / "data" / "train" / "0.wav")]
        assert len(batch["unreadable"]) == 1 and f"1.wav: {message}" in batch["unreadable"][0]
        assert set(dataset.collater(samples[1:])) == {"unreadable"}


def test_missing_files_are_an_error_before_training(tmp_path: Path, small: Any) -> None:
    data = small.write_speech(tmp_path / "data", {"train": [0.5, 0.5, 0.5]})
    (data / "train" / "2.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: 1 of 3 files are missing, the first: .*2\.wav"):
        small.make_task(data).load_dataset("train")
    with pytest.raises(FileNotFoundError, match=r"valid\.tsv: no such manifest; .*skill-manifest"):
        small.make_task(data).load_dataset("valid")


def test_nothing_long_enough_is_an_error(speech: Path, small: Any) -> None:
    with pytest.raises(ValueError, match=r"train\.tsv: no utterance has task\.min_sample_size=99999 samples"):
        small.make_task(speech, min_sample_size=99999).load_dataset("train")


def test_teacher_is_loaded_when_first_asked_for(speech: Path, small: Any, teacher_file: Path) -> None:
    task = small.make_task(speech, speech / "no_such_teacher.pt")
    task.load_dataset("train")
    with pytest.raises(FileNotFoundError, match="no_such_teacher"):
        _ = task.teacher
    with pytest.raises(ValueError, match="task.teacher: not set"):
        _ = small.make_task(speech).teacher
    task = small.make_task(speech, teacher_file)
    assert task.teacher is task.teacher


def test_teacher_is_frozen_and_outside_of_everything(speech: Path, small: Any, teacher_file: Path) -> None:
    task = small.make_task(speech, teacher_file)
    model = task.build_model(small.student_config(teacher_file, pruning_units=["ffn"]))
    criterion = small.make_criterion(task, groups=[[0], [1, 2, 3]], target_sparsity=0.1)
    model.train()
    criterion.train()
    teacher = task.teacher.encoder
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
    with pytest.raises(ValueError, match=r"task\.normalize: True, but the teacher .*set task\.normalize=false"):
        _ = small.make_task(speech, teacher_file, normalize=True).teacher
    save_encoder(small.random_encoder(normalize=True), tmp_path / "normalised.safetensors")
    with pytest.raises(ValueError, match=r"task\.normalize: False, .*set task\.normalize=true"):
        _ = small.make_task(speech, tmp_path / "normalised.safetensors").teacher


def test_teacher_runs_in_float32_up_to_the_deepest_group(speech: Path, small: Any, teacher_file: Path) -> None:
    teacher = small.make_task(speech, teacher_file).teacher
    source = small.waves()
    with torch.no_grad():
        states = small.random_encoder()(source.half().float()).hidden_states
    (low, high), mask = teacher.group_means(source.half(), None, [[0, 2], [1]])
    assert mask is None and low.dtype == torch.float32
    assert torch.allclose(low, (states[0] + states[2]) / 2) and torch.allclose(high, states[1])
    ran: list[int] = []
    for i, layer in enumerate(teacher.encoder.transformer.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    teacher.group_means(source, None, [[0, 2], [1]])
    assert ran == [0, 1]


def test_examples_manifests_have_their_audio(small: Any) -> None:
    data = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"
    task = small.make_task(data)
    for split in ("train", "valid"):
        task.load_dataset(split)
        dataset = task.dataset(split)
        longest = int(np.argmax(dataset.sizes))
        assert len(dataset[longest]["source"]) == dataset.sizes[longest]
