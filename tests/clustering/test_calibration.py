"""The choice of utterances, and independence of batches."""

import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from messages import says

from skill_fairseq.audio.manifest import Manifest, load_audio
from skill_fairseq.audio.pieces import pieces
from skill_fairseq.clustering import calibration
from skill_fairseq.clustering.calibration import choose_utterances, layer_similarity
from skill_fairseq.clustering.similarity import MEASURES, LayerSimilarity
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder

SHAPE = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "conv_pos": 8,
    "conv_pos_groups": 2,
}


def encoder(**changes) -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder(EncoderConfig(**{**SHAPE, **changes})).eval()


def manifest(sizes, order=None) -> Manifest:
    order = range(len(sizes)) if order is None else order
    names = [f"{i}.flac" for i in order]
    return Manifest(Path("/data"), names, [sizes[i] for i in order], Path("train.tsv"))


SIZES = [16000 * seconds for seconds in (1, 2, 3, 2, 5, 1, 2, 40)]


def names(found: Manifest, chosen) -> list:
    return [found.paths[i] for i in chosen]


def test_choice_does_not_depend_on_the_manifests_order():
    forwards, backwards = manifest(SIZES), manifest(SIZES, [7, 3, 5, 0, 6, 1, 2, 4])
    for limits in ({}, {"max_seconds": 9}, {"max_utterances": 3}):
        chosen = names(forwards, choose_utterances(forwards, **limits))
        assert chosen == names(backwards, choose_utterances(backwards, **limits))
    assert sorted(choose_utterances(forwards)) == list(range(8))


def test_limits_hold_and_seeds_differ():
    found = manifest(SIZES)
    seen = set()
    for seed in range(10):
        chosen = choose_utterances(found, max_seconds=6, seed=seed)
        assert 4 <= sum(SIZES[i] for i in chosen) / 16000 <= 6  # 1 s is the only gap that could remain unfilled
        seen.add(tuple(sorted(chosen)))
        assert len(choose_utterances(found, max_utterances=2, seed=seed)) == 2
    assert len(seen) > 3


def test_equal_lengths_stand_side_by_side():
    lengths = [SIZES[i] for i in choose_utterances(manifest(SIZES))]
    changes = sum(a != b for a, b in zip(lengths, lengths[1:]))
    assert changes == len(set(SIZES)) - 1


def test_nothing_fits():
    with pytest.raises(ValueError, match=says("8 utterances", "train.tsv", "0.5 s", "1.00 s")):
        choose_utterances(manifest(SIZES), max_seconds=0.5)


@pytest.fixture
def files(tmp_path):
    """Noise of varying loudness; three recordings of one length, two of another, one of a third."""
    generator = np.random.default_rng(0)
    found = []
    for i, samples in enumerate([4000, 4000, 4000, 5111, 6000, 6000]):
        found.append(tmp_path / f"{i}.wav")
        noise = generator.standard_normal(samples) * 0.02 * (i + 1) + 0.01 * i
        soundfile.write(str(found[-1]), noise.astype(np.float32), 16000, subtype="FLOAT")
    return found


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_utterances_encoded_one_by_one(files, normalize):
    model = encoder(normalize=normalize, layer_norm_first=normalize)
    expected = LayerSimilarity(MEASURES)
    with torch.no_grad():
        for file in files:
            wave = load_audio(file)
            if normalize:
                wave = F.layer_norm(wave, wave.shape)
            expected.update(model(wave[None]).hidden_states)
    for batch_size in (1, 2, 8):
        found = layer_similarity(model, files, MEASURES, batch_size)
        assert found.num_frames == expected.num_frames == 3 * 12 + 15 + 2 * 18
        for measure, matrix in found.distances().items():
            np.testing.assert_allclose(matrix, expected.distances()[measure], rtol=2e-5, atol=1e-6)


def test_long_recordings_are_encoded_in_pieces(files, monkeypatch):
    monkeypatch.setattr(calibration, "pieces", functools.partial(pieces, seconds=0.2))
    model = encoder()
    lengths = []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    found = layer_similarity(model, files[2:5], MEASURES)
    assert lengths == [2000, 2000, 2556, 2555, 3000, 3000]
    expected = LayerSimilarity(MEASURES)
    with torch.no_grad():
        for file in files[2:5]:
            for piece in load_audio(file)[None].tensor_split(2, 1):
                expected.update(model(piece).hidden_states)
    for measure, matrix in found.distances().items():
        np.testing.assert_array_equal(matrix, expected.distances()[measure])


def test_progress_adds_up(files):
    seconds = []
    layer_similarity(encoder(), files, ["l2"], 2, seconds.append)
    assert seconds == [0.5, 0.25, 5111 / 16000, 0.75]


def test_broken_audio_is_skipped_and_named(files, tmp_path, caplog):
    (tmp_path / "text.flac").write_text("no audio at all")
    soundfile.write(str(tmp_path / "short.wav"), np.zeros(399, dtype=np.float32), 16000)
    broken = [tmp_path / name for name in ("gone.wav", "short.wav", "text.flac")]
    skipped = []
    found = layer_similarity(encoder(), [broken[0], *files[:3], *broken[1:], *files[3:]], MEASURES, 2, skipped=skipped)
    expected = layer_similarity(encoder(), files, MEASURES, 2)
    assert skipped == broken and found.num_frames == expected.num_frames
    for measure, matrix in expected.distances().items():
        np.testing.assert_array_equal(found.distances()[measure], matrix)
    assert [next(f for f in broken if str(f) in record.message) for record in caplog.records] == broken
    with pytest.raises(ValueError, match=says("none", "3 recordings", "gone.wav")):
        layer_similarity(encoder(), broken)


def test_broken_teachers_are_named(files):
    model = encoder()
    torch.nn.init.constant_(model.transformer.layers[1].ffn_norm.bias, float("inf"))
    with pytest.raises(ValueError, match=says("0.wav", "hidden_states", "NaN", "layers [2, 3]")):
        layer_similarity(model, files)
