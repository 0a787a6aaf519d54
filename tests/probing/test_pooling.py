"""Statistics over time."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from messages import says
from torch import Tensor

from skill_fairseq.audio.pieces import pieces
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing import pooling
from skill_fairseq.probing.pooling import EncoderFeatures, pool_files, temporal_statistics


def small_encoder(normalize: bool) -> SpeechEncoder:
    torch.manual_seed(0)
    config = EncoderConfig(
        conv_feature_layers="[(8,10,5)] + [(8,8,8)] * 2",
        encoder_layers=2,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        conv_pos=8,
        conv_pos_groups=2,
        normalize=normalize,
    )
    return SpeechEncoder(config)


def test_statistics_are_the_formula() -> None:
    states = [torch.randn(5, 3, generator=torch.Generator().manual_seed(layer)) * 4 + layer for layer in range(2)]
    found = temporal_statistics([states])
    assert found.shape == (2, 6)
    for layer, state in enumerate(states):
        for d in range(3):
            values = [float(value) for value in state[:, d]]
            mean = sum(values) / 5
            spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 5)
            assert found[layer, d] == pytest.approx(mean, abs=1e-5)
            assert found[layer, 3 + d] == pytest.approx(spread, abs=1e-5)
    assert temporal_statistics([[torch.ones(1, 3)]]).tolist() == [[1, 1, 1, 0, 0, 0]]
    parts = [[state[:1] for state in states], [state[1:] for state in states]]
    torch.testing.assert_close(temporal_statistics(parts), found)


@pytest.mark.parametrize("normalize", [False, True])
def test_encoder_features_are_the_hidden_states_in_eval_mode(normalize: bool) -> None:
    encoder = small_encoder(normalize).train()
    wave = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.2
    (states,) = EncoderFeatures(encoder)(wave)
    assert not encoder.training and len(states) == 3
    source = (wave - wave.mean()) / (wave.var(unbiased=False) + 1e-5).sqrt() if normalize else wave
    expected = encoder(source[None]).hidden_states
    for found, state in zip(states, expected):
        assert not found.requires_grad
        torch.testing.assert_close(found, state[0].detach(), atol=1e-4, rtol=1e-4)


def write(folder: Path, name: str, samples: int) -> Path:
    wave = np.random.default_rng(samples).normal(size=samples) * 0.1
    soundfile.write(folder / name, wave, 16000)
    return folder / name


def test_every_recording_is_computed_once_whatever_its_company(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{samples}.flac", samples) for samples in (500, 900, 1300)]
    lengths: list[int] = []

    def features(wave: Tensor) -> list[list[Tensor]]:
        lengths.append(len(wave))
        return [[wave[:, None]]]

    pooled = pool_files(features, [*files, files[0]])
    assert lengths == [500, 900, 1300] and list(pooled) == files
    alone = pool_files(features, [files[1]])
    np.testing.assert_array_equal(alone[files[1]], pooled[files[1]])
    assert pooled[files[1]].shape == (1, 2) and pooled[files[1]].dtype == np.float32


def test_recordings_that_cannot_be_read_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [write(tmp_path, "a.flac", 500), tmp_path / "b.raw", write(tmp_path, "c.flac", 900)]
    files[1].write_bytes(bytes(32000))
    pooled = pool_files(lambda wave: [[wave[:, None]]], files)
    assert list(pooled) == [files[0], files[2]] and str(files[1]) in caplog.text
    with pytest.raises(ValueError, match=says("none", "1 recordings", "b.raw")):
        pool_files(lambda wave: [[wave[:, None]]], files[1:2])


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "a.flac", 500)
    with pytest.raises(ValueError, match=says("a.flac", "broken", "NaN")):
        pool_files(lambda wave: [[wave[:, None] / 0]], [file], "broken")


@pytest.mark.parametrize("normalize", [False, True])
def test_long_recordings_are_encoded_in_pieces(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "pieces", functools.partial(pieces, seconds=0.1))
    encoder = small_encoder(normalize)
    lengths: list[int] = []
    encoder.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    wave = torch.randn(4001, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.2
    found = temporal_statistics(EncoderFeatures(encoder)(wave))
    assert lengths == [1334, 1334, 1333]
    source = F.layer_norm(wave, wave.shape) if normalize else wave  # over the whole recording
    states = [encoder(part[None]).hidden_states for part in source.tensor_split(3)]
    for layer, row in enumerate(found):
        frames = torch.cat([state[layer][0] for state in states]).detach()
        wanted = torch.cat([frames.mean(0), frames.std(0, unbiased=False)])
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)
