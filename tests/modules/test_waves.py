"""Features of raw waveforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from messages import says


@pytest.mark.parametrize("style", ["base", "large"])
def test_each_utterance_is_as_it_would_be_alone(small: Any, style: str) -> None:
    encoder = small.random_encoder(**(small.LARGE_STYLE if style == "large" else {}), normalize=style == "large")
    waves = [torch.from_numpy(small.tone(seconds, seed)) for seed, seconds in enumerate((0.5, 0.3, 0.5))]
    states, lengths = encoder.features(waves, 16000, layers=[3, 0])
    for row, wave in enumerate(waves):
        with torch.no_grad():
            alone = encoder(F.layer_norm(wave, wave.shape)[None] if style == "large" else wave[None]).hidden_states
        assert lengths[row] == alone[0].shape[1]
        for found, layer in zip(states, (3, 0)):
            torch.testing.assert_close(found[row, : lengths[row]], alone[layer][0], rtol=1e-5, atol=1e-5)
            assert not found[row, lengths[row] :].any()


def test_all_layers_of_one_array(small: Any) -> None:
    encoder, wave = small.random_encoder(), small.tone(0.3, 0)
    states, lengths = encoder.features(wave.astype(np.float64), 16000)
    assert len(states) == encoder.config.encoder_layers + 1 and states[0].shape[:2] == (1, int(lengths[0]))
    assert states[0].dtype == torch.float32 and not states[0].requires_grad


def test_another_rate_is_resampled(small: Any) -> None:
    """A tone within both rates: almost the same features, unlike without resampling."""
    encoder, time = small.random_encoder(), np.arange(48000) / 48000
    high = np.sin(2 * np.pi * 220 * time).astype(np.float32)
    low = high[::3]
    found, lengths = encoder.features(high, 48000, layers=[3])
    wanted, frames = encoder.features(low, 16000, layers=[3])
    assert lengths.tolist() == frames.tolist()
    inner = slice(2, -2)  # the filter rings at both ends
    assert (found[0][0, inner] - wanted[0][0, inner]).abs().mean() < 0.05 * wanted[0].abs().mean()


@pytest.mark.parametrize(
    ("waves", "rate", "layers", "said"),
    [
        (np.zeros(4000, np.int16), 16000, None, ["int16", "32768"]),
        (torch.zeros(2, 4000), 16000, None, ["(2, 4000)", "one channel"]),
        ([], 16000, None, ["empty"]),
        (torch.zeros(4000), 16000, [4], ["layers", "[4]", "0 to 3"]),
        (torch.zeros(4000), 16000, [], ["layers"]),
        (torch.zeros(4000), 0, None, ["sampling_rate", "0", "16000"]),
    ],
)
def test_what_cannot_be_encoded(small: Any, waves: Any, rate: int, layers: Any, said: list[str]) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        small.random_encoder().features(waves, rate, layers)


def test_in_training_mode_it_refuses(small: Any) -> None:
    with pytest.raises(ValueError, match="eval"):
        small.random_encoder().train().features(torch.zeros(4000), 16000)


def test_without_scipy_the_remedy_is_named(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.signal", None)
    with pytest.raises(ValueError, match=says("44100", "16000", "pip install scipy")):
        small.random_encoder().features(torch.zeros(4000), 44100)
