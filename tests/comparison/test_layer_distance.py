"""Distances of hidden states by layer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from messages import says

from skill_fairseq.audio.pieces import pieces
from skill_fairseq.clustering.similarity import LayerSimilarity
from skill_fairseq.comparison import layer_distance
from skill_fairseq.comparison.layer_distance import KINDS, layer_distances, mean_over, state_distances


def test_distances_against_numbers_worked_out_by_hand() -> None:
    teacher = [torch.tensor([[3.0, 4.0], [1.0, 0.0]] * 2)]
    student = [torch.tensor([[4.0, 3.0], [0.0, 2.0]] * 2)]
    l1, normalized, cos, _ = state_distances(student, teacher)[:, 0].tolist()
    assert l1 == pytest.approx((1 + 1 + 1 + 2) / 4)
    assert normalized == pytest.approx(2, abs=1e-3)  # two features in reverse order: (1, -1) against (-1, 1)
    assert cos == pytest.approx(1 - (24 / 25 + 0) / 2)


def test_normalized_distance_ignores_scale_and_shift_of_a_frame() -> None:
    states = [torch.randn(7, 16, generator=torch.Generator().manual_seed(0))]
    distances = dict(zip(KINDS, state_distances([10 * states[0] + 3], states)[:, 0].tolist()))
    assert distances["l1"] > 5 and distances["l1_normalized"] < 1e-4


def test_cka_ignores_rotation_and_scale_and_is_that_of_the_clustering() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    distances = dict(zip(KINDS, state_distances([3 * one @ rotation + 1], [one])[:, 0].tolist()))
    assert abs(distances["cka"]) < 1e-12 and distances["l1_normalized"] > 0.5
    both = LayerSimilarity(["cka_minibatch"], block_frames=40, buffer_blocks=1)
    both.update([one[None], (one + two)[None]])
    expected = both.distances()["cka_minibatch"][0, 1]
    assert dict(zip(KINDS, state_distances([one], [one + two])[:, 0].tolist()))["cka"] == pytest.approx(expected)
    assert 0.2 < expected < 0.8


def test_a_student_whose_frames_are_alike_is_as_far_as_can_be_by_cka() -> None:
    """Of a teacher's layer that does not vary nothing can be said."""
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    constant = torch.ones(50, 8)
    assert state_distances([constant], [states])[KINDS.index("cka")].item() == 1
    with pytest.raises(ValueError, match=says("do not vary")):
        state_distances([states], [constant])


def test_means_over_frames_and_over_recordings(tmp_path: Path, small: Any) -> None:
    files = []
    for number, seconds in enumerate((0.3, 0.9)):
        files.append(tmp_path / f"{number}.wav")
        soundfile.write(str(files[-1]), small.tone(seconds, number), 16000)
    student, teacher = small.random_encoder(1), small.random_encoder(2)
    found = layer_distances(student, teacher, files)
    frames, tables = [], []
    for file in files:
        wave = torch.from_numpy(soundfile.read(str(file), dtype="float32")[0])[None]
        with torch.no_grad():
            pair = [[state[0] for state in encoder(wave).hidden_states] for encoder in (student, teacher)]
        frames.append(len(pair[0][0]))
        tables.append(state_distances(*pair).numpy())
    assert found.num_frames == sum(frames)
    for k, kind in enumerate(KINDS):
        by_layer = np.average([table[k] for table in tables], axis=0, weights=frames)
        assert found.layers[kind] == pytest.approx(by_layer, abs=1e-6) and len(by_layer) == 4
        assert found.recordings[kind] == pytest.approx([table[k].mean() for table in tables], abs=1e-6)
        assert min(found.layers[kind]) > 0.01
    zero = layer_distances(teacher, teacher, files)
    assert all(max(zero.layers[kind]) < 1e-6 for kind in KINDS)


def test_long_recordings_are_compared_in_pieces(tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "long.wav"
    wave = small.tone(0.9, 1)
    soundfile.write(str(file), wave, 16000, subtype="FLOAT")
    student, teacher = small.random_encoder(1), small.random_encoder(2)
    monkeypatch.setattr(layer_distance, "pieces", functools.partial(pieces, seconds=0.5))
    lengths: list[int] = []
    teacher.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    found = layer_distances(student, teacher, [file])
    assert lengths == [7200, 7200] and len(found.recordings["l1"]) == 1
    frames, tables = [], []
    for piece in torch.from_numpy(wave)[None].tensor_split(2, 1):
        with torch.no_grad():
            pair = [[state[0] for state in encoder(piece).hidden_states] for encoder in (student, teacher)]
        frames.append(len(pair[0][0]))
        tables.append(state_distances(*pair).numpy())
    wanted = np.average(tables, axis=0, weights=frames)
    assert found.num_frames == sum(frames)
    for k, kind in enumerate(KINDS):
        assert found.layers[kind] == pytest.approx(wanted[k], abs=1e-6)
        assert found.recordings[kind] == pytest.approx([wanted[k].mean()], abs=1e-6)


def test_another_width_leaves_cka_which_pads_with_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, wide = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (3, 8))
    found = state_distances([narrow], [wide])
    padded = state_distances([torch.cat([narrow, torch.zeros(40, 5)], 1)], [wide])
    assert found.shape == (1, 1) and found[0, 0] == pytest.approx(padded[KINDS.index("cka"), 0])


def test_another_depth_is_compared_at_the_same_share(tmp_path: Path, small: Any) -> None:
    soundfile.write(str(tmp_path / "a.wav"), small.tone(0.9, 1), 16000)
    deep, shallow = small.random_encoder(1, encoder_layers=4), small.random_encoder(2, encoder_layers=2)
    found = layer_distances(shallow, deep, [tmp_path / "a.wav"])
    assert found.teacher_layers == [0, 2, 4] and set(found.layers) == set(KINDS)
    wave = torch.from_numpy(soundfile.read(str(tmp_path / "a.wav"), dtype="float32")[0])[None]
    with torch.no_grad():
        own, theirs = ([state[0] for state in encoder(wave).hidden_states] for encoder in (shallow, deep))
    assert found.layers["l1"] == pytest.approx(
        [(s - t).abs().mean().item() for s, t in zip(own, theirs[::2])], abs=1e-6
    )


def test_other_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=says("states [(3, 4)]", "teacher states [(6, 4)]")):
        state_distances([torch.zeros(3, 4)], [torch.zeros(6, 4)])


def test_a_recording_too_short_for_cka_is_named(tmp_path: Path, small: Any) -> None:
    soundfile.write(str(tmp_path / "short.wav"), small.tone(0.065, 0), 16000)
    with pytest.raises(ValueError, match=says("short.wav", "3 frames", "at least 4")):
        layer_distances(small.random_encoder(), small.random_encoder(), [tmp_path / "short.wav"])


def test_no_recordings_are_refused(small: Any) -> None:
    with pytest.raises(ValueError, match=says("empty", "at least one")):
        layer_distances(small.random_encoder(), small.random_encoder(), [])


def test_mean_over_some_layers() -> None:
    assert mean_over([1.0, 2.0, 4.0], [0, 2]) == 2.5 and mean_over([1.0], []) is None
