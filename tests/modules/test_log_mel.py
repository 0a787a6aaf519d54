"""Log-mel features before the convolutions: the explicit formula, frames, gain, padding, gates, streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from messages import says
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig, hubert_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.log_mel import LogMel
from skill_fairseq.modules.size import count_macs, count_parameters, widths_of
from skill_fairseq.pruning.shrink import shrink
from tests.conftest import random_encoder

RATE, WINDOW, HOP = 16000, 400, 160
CONVS = "[(16,3,1), (24,3,2)]"
MELS = {"mel_bins": 20, "conv_feature_layers": CONVS, "conv_bias": True}


def speech(*lengths: int) -> Tensor:
    """(B, N) noise of varying level and colour; zeros after shorter ones."""
    generator = torch.Generator().manual_seed(0)
    waves = [torch.randn(n, generator=generator).cumsum(0).diff(prepend=torch.zeros(1)) for n in lengths]
    waves = [0.05 * w * torch.linspace(0, 9, len(w)).sin() for w in waves]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)


def loop_features(wave: np.ndarray, bins: int, before: int, after: int) -> np.ndarray:
    """(N,) samples to (T, bins) in float64, from the definition of the discrete Fourier transform."""
    wave = np.concatenate([np.zeros(before), wave.astype(np.float64), np.zeros(after)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    angles = -2j * np.pi * np.outer(np.arange(WINDOW // 2 + 1), np.arange(WINDOW)) / WINDOW
    low, high = (1127 * np.log(1 + f / 700) for f in (20, RATE / 2))
    centres = 1127 * np.log(1 + np.arange(WINDOW // 2 + 1) * RATE / WINDOW / 700)
    weights = np.zeros((bins, WINDOW // 2 + 1))
    for m in range(bins):
        left, centre, right = (low + (high - low) * (m + i) / (bins + 1) for i in range(3))
        for k, at in enumerate(centres):
            weights[m, k] = max(0.0, min((at - left) / (centre - left), (right - at) / (right - centre)))
    rows = []
    for start in range(0, len(wave) - WINDOW + 1, HOP):
        power = np.abs(np.exp(angles) @ (hann * wave[start : start + WINDOW])) ** 2
        rows.append(np.log10(np.maximum(weights @ power, 1e-10)))
    levels = np.stack(rows)
    return (np.maximum(levels, levels.max() - 8) - levels.max() + 4) / 4


@pytest.mark.parametrize("bins", [1, 20, 80])
def test_features_are_the_formula(bins: int) -> None:
    config = EncoderConfig(mel_bins=bins, conv_feature_layers=CONVS)
    assert config.mel_padding == (320, 320)
    wave = speech(5123)
    found = LogMel(config)(wave)[0]
    wanted = loop_features(wave[0].numpy(), bins, 320, 320)
    assert found.shape == wanted.shape == ((5123 + 640 - 400) // 160 + 1, bins)
    assert np.abs(found.numpy() - wanted).max() < 1e-5 and wanted.std() > 0.1
    assert wanted.max() == found.max() == 1
    exact = LogMel(config)(wave.double())[0]  # float64 audio, float32 filters
    assert exact.dtype == torch.float64 and np.abs(exact.numpy() - wanted).max() < 1e-6


@pytest.mark.parametrize("style", ["default", "layer_norm"])
def test_frames_are_textbook_convolutions_of_the_features(style: str) -> None:
    encoder = random_encoder(**MELS, extractor_mode=style)
    wave = speech(5123)
    x = torch.from_numpy(loop_features(wave[0].numpy(), 20, 320, 320)).float().T[None]
    for layer in encoder.feature_extractor.layers:
        x = F.conv1d(x, layer.conv.weight, layer.conv.bias, layer.conv.stride)
        if style == "layer_norm":
            x = F.layer_norm(x.mT, x.shape[1:2], layer.norm.weight, layer.norm.bias).mT
        else:
            assert layer.norm is None
        x = F.gelu(x)
    found, _ = encoder.feature_extractor(wave)
    torch.testing.assert_close(found, x.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convs", [CONVS, "[(8,1,2)]", "[(8,5,2), (8,1,1)]", "[(8,4,1), (8,2,2), (8,3,1)]"])
def test_as_many_frames_as_the_published_conv_stack(convs: str) -> None:
    """The stack's windows: the first covers 400 samples, the next starts 320 later."""
    config, teacher = EncoderConfig(mel_bins=8, conv_feature_layers=convs), hubert_base()
    lengths = [*range(380, 1100), 16000, 47_999, 160_000, 10**7]
    counted = config.num_frames(torch.tensor(lengths))
    assert counted.tolist() == [config.num_frames(n) for n in lengths] == [teacher.num_frames(n) for n in lengths]
    assert (config.downsampling, config.receptive_field) == (teacher.downsampling, teacher.receptive_field)
    encoder = random_encoder(mel_bins=8, conv_feature_layers=convs)
    for n in (400, 401, 559, 560, 719, 720, 1039, 1040, 5000, 90_000):
        for enabled in (True, False):  # the second is processed by chunks
            with torch.set_grad_enabled(enabled):
                assert encoder.feature_extractor(speech(n))[0].size(1) == teacher.num_frames(n)
    with pytest.raises(ValueError, match=says("399 samples", "400")):
        encoder(speech(399))


def test_chunks_and_prepared_weights_change_nothing() -> None:
    encoder, wave = random_encoder(**MELS), speech(200_000, 90_000)
    wanted = encoder(wave)
    with torch.no_grad():
        for found in (encoder(wave), encoder.prepare("plain")(wave)):
            torch.testing.assert_close(found.x, wanted.x, rtol=1e-4, atol=1e-5)


def test_neither_gain_nor_padding_is_heard() -> None:
    encoder, wave = random_encoder(**MELS, padding_rule="convolution"), speech(9000, 6100)
    with torch.no_grad():
        alone = encoder(wave[1:, :6100]).x
        torch.testing.assert_close(encoder(7 * wave[1:, :6100]).x, alone, rtol=1e-4, atol=1e-5)
        padding = torch.arange(9000) >= torch.tensor([[9000], [6100]])
        out = encoder(wave, padding)
    assert (~out.padding_mask).sum(1).tolist() == [27, 18]
    torch.testing.assert_close(out.x[1:, :18], alone, rtol=1e-4, atol=1e-5)


def test_silence_and_half_precision() -> None:
    encoder = random_encoder(**MELS)
    for wave in (torch.zeros(2, 4000), torch.full((1, 4000), 1e-12), torch.full((1, 4000), 1.0)):
        assert encoder(wave).x.isfinite().all()
    wave = speech(8000)
    wanted = encoder(wave).x
    encoder.bfloat16()
    assert encoder.feature_extractor.log_mel.filters.dtype == torch.float32
    error = (encoder(wave).x.float() - wanted).abs().mean() / wanted.abs().mean()
    assert 0 < error < 0.03


def test_every_weight_gets_a_gradient_and_so_does_the_audio() -> None:
    encoder = random_encoder(**MELS, pruning_units=["conv", "heads", "ffn"]).train()
    wave = speech(8000).requires_grad_()
    encoder(wave).x.square().sum().backward()
    silent = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent and wave.grad.isfinite().all() and wave.grad.any()
    assert not [name for name in encoder.state_dict() if "log_mel" in name]


def test_gradients_are_those_of_autograd_on_the_textbook_form() -> None:
    encoder = random_encoder(**MELS)
    stack, wave = encoder.feature_extractor, speech(4000)
    stack(wave)[0].square().sum().backward()
    found = [layer.conv.weight.grad.clone() for layer in stack.layers]
    encoder.zero_grad()
    x = stack.log_mel(wave).mT
    for layer in stack.layers:
        x = F.gelu(F.conv1d(x, layer.conv.weight, layer.conv.bias, layer.conv.stride))
    x.square().sum().backward()
    for layer, gradient in zip(stack.layers, found):
        torch.testing.assert_close(gradient, layer.conv.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"extractor_mode": "layer_norm"}, {"feature_linear": False}])
def test_sizes_are_those_of_the_modules(changes: dict[str, Any]) -> None:
    convs = {"conv_feature_layers": "[(16,3,1), (32,3,2)]"} if "feature_linear" in changes else {}
    encoder = random_encoder(**{**MELS, **convs, **changes})
    config, widths = encoder.config, widths_of(encoder.config)
    assert count_parameters(config, widths) == encoder.num_parameters()
    assert int(count_parameters(config, {k: torch.tensor(v) for k, v in widths.items()})) == encoder.num_parameters()


def test_work_of_the_front_end_by_hand() -> None:
    config, shorter = (
        EncoderConfig(mel_bins=80, conv_feature_layers=c) for c in ("[(64,3,1), (96,3,2)]", "[(96,1,2)]")
    )
    frames = (16000 + 640 - 400) // 160 + 1  # of 10 ms, with those of silence
    assert frames == 102 and config.num_frames(16000) == 49
    own = frames * 201 * (800 + 80) + (frames - 2) * 3 * 80 * 64 + 49 * 3 * 64 * 96
    other = 98 * 201 * (800 + 80) + 49 * 80 * 96
    found = [count_macs(c, widths_of(c), 16000) for c in (config, shorter)]
    assert found[0] - found[1] == own - other
    with pytest.raises(ValueError, match=says("num_samples is 399")):
        count_macs(config, widths_of(config), 399)


def test_a_shrunk_student_is_the_gated_one() -> None:
    gated = random_encoder(**MELS, pruning_units=["conv", "heads", "ffn"])
    with torch.no_grad():
        gated.gates.log_alpha.copy_(torch.randn(len(gated.gates.log_alpha), generator=torch.Generator().manual_seed(1)))
    small, wave = shrink(gated), speech(8000)
    assert small.num_parameters() < gated.num_parameters() and small.config.conv_channels != [16, 24]
    assert small.feature_extractor.layers[0].conv.in_channels == 20
    with torch.no_grad():
        torch.testing.assert_close(small(wave).x, gated(wave).x, rtol=1e-4, atol=1e-5)


def test_a_stream_hears_the_level_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skill_fairseq.modules.encoder.BLOCK_SECONDS", 0.777)
    encoder, audio = random_encoder(**MELS), speech(70_001)[0]
    audio[:20_000] *= 0.01
    audio[-50:] *= 40  # a peak in a window that reaches beyond the end
    with torch.no_grad():
        whole = encoder(audio[None]).hidden_states[0]
    for chunk, context in ((1.0, 0.3), (100.0, 0.0), (0.02, 0.02)):  # the ends need only one frame of context
        found = [out.hidden_states[0] for out in encoder.stream(audio, chunk, context, last_layer=0)]
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_shape_is_written_where_it_is_not_the_usual_one() -> None:
    config = EncoderConfig(**MELS)
    assert "mel_bins" not in hubert_base().to_dict() and config.to_dict()["mel_bins"] == 20
    assert EncoderConfig.from_dict(config.to_dict()) == config
    assert SpeechEncoder(config.replace(conv_channels=[3, 5])).config.full() == config


@pytest.mark.parametrize("value", [-1, 81, "80", True, 40.0])
def test_bad_numbers_of_bins(value: Any) -> None:
    with pytest.raises(ValueError, match=says("model.mel_bins", repr(value))):
        EncoderConfig(mel_bins=value, conv_feature_layers=CONVS)


@pytest.mark.parametrize(
    "convs", ["[(16,3,1)]", "[(16,3,2), (16,3,2)]", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"]
)
def test_strides_that_do_not_give_the_teachers_frames(convs: str) -> None:
    with pytest.raises(ValueError, match=says("model.conv_feature_layers", "strides", "2", "mel_bins")):
        EncoderConfig(mel_bins=80, conv_feature_layers=convs)
