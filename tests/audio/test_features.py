"""Log-mel and MFCC against their formulas, written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from messages import says

from skill_fairseq.audio.features import deltas, log_mel, mfcc

RATE, WINDOW, HOP, N_FFT = 16000, 400, 160, 512


def signal(samples: int = 1100, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.05


def mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


def loop_log_mel(wave: np.ndarray, n_mels: int) -> np.ndarray:
    """Explicit sums, in float64."""
    low, high = mel(20), mel(RATE / 2)
    result = []
    for start in range(0, len(wave) - WINDOW + 1, HOP):
        frame = [float(x) for x in wave[start : start + WINDOW]]
        mean = sum(frame) / WINDOW
        frame = [x - mean for x in frame]
        emphasised = [frame[n] - 0.97 * frame[max(n - 1, 0)] for n in range(WINDOW)]
        windowed = [
            x * (0.5 - 0.5 * math.cos(2 * math.pi * n / (WINDOW - 1))) ** 0.85 for n, x in enumerate(emphasised)
        ]
        angles = 2 * math.pi * np.outer(np.arange(N_FFT // 2 + 1), np.arange(WINDOW)) / N_FFT
        power = (np.cos(angles) @ windowed) ** 2 + (np.sin(angles) @ windowed) ** 2
        row = []
        for m in range(n_mels):
            left, centre, right = (low + (high - low) * (m + i) / (n_mels + 1) for i in range(3))
            energy = 0.0
            for k in range(N_FFT // 2 + 1):
                at = mel(k * RATE / N_FFT)
                if left < at <= centre:
                    energy += power[k] * (at - left) / (centre - left)
                elif centre < at < right:
                    energy += power[k] * (right - at) / (right - centre)
            row.append(math.log(max(energy, 2.0**-23)))
        result.append(row)
    return np.array(result)


def loop_deltas(features: np.ndarray) -> np.ndarray:
    last = len(features) - 1
    return np.array(
        [
            sum(n * (features[min(t + n, last)] - features[max(t - n, 0)]) for n in (1, 2)) / (2 * (1 + 4))
            for t in range(len(features))
        ]
    )


@pytest.mark.parametrize("n_mels", [23, 80])
def test_log_mel_is_the_formula(n_mels: int) -> None:
    wave = signal()
    found = log_mel(wave, n_mels=n_mels)
    assert found.dtype == torch.float32 and found.shape == (5, n_mels)
    np.testing.assert_allclose(found.numpy(), loop_log_mel(wave.numpy(), n_mels), atol=2e-4)


def test_mfcc_is_the_formula() -> None:
    wave = signal()
    energies = loop_log_mel(wave.numpy(), 23)
    cepstra = np.zeros((5, 13))
    for k in range(13):
        scale = math.sqrt((1 if k == 0 else 2) / 23) * (1 + 11 * math.sin(math.pi * k / 22))
        for m in range(23):
            cepstra[:, k] += scale * energies[:, m] * math.cos(math.pi * k * (m + 0.5) / 23)
    first = loop_deltas(cepstra)
    found = mfcc(wave)
    assert found.dtype == torch.float32 and found.shape == (5, 39)
    np.testing.assert_allclose(found.numpy(), np.hstack([cepstra, first, loop_deltas(first)]), atol=2e-3)


def test_a_tone_is_loudest_in_its_own_filter() -> None:
    centres = [mel(20) + (mel(8000) - mel(20)) * (m + 1) / 81 for m in range(80)]
    for hertz in (500, 1000, 3000, 6000):
        wave = torch.sin(2 * math.pi * hertz * torch.arange(16000) / RATE)
        nearest = min(range(80), key=lambda m: abs(centres[m] - mel(hertz)))
        assert (log_mel(wave).argmax(1) == nearest).all(), hertz


def test_frames_have_no_padding_and_gain_is_an_offset() -> None:
    wave = signal(16000)
    assert len(log_mel(wave)) == 98
    assert len(log_mel(wave[:400])) == 1 and len(log_mel(wave[:559])) == 1 and len(log_mel(wave[:560])) == 2
    torch.testing.assert_close(log_mel(3 * wave), log_mel(wave) + 2 * math.log(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(log_mel(wave[160:]), log_mel(wave)[1:])


def test_silence_is_finite() -> None:
    assert torch.allclose(log_mel(torch.zeros(800)), torch.full((3, 80), math.log(2.0**-23)))
    assert mfcc(torch.zeros(800)).isfinite().all()


def test_deltas_of_a_line_are_its_slope() -> None:
    line = torch.arange(10.0)[:, None] * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(deltas(line)[2:-2], torch.tensor([[1.0, -2.0]]).expand(6, 2))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=says("399 samples", 400)):
        log_mel(torch.zeros(399))
    with pytest.raises(ValueError, match=says("(1, 800)", "(N,)")):
        log_mel(torch.zeros(1, 800))
    with pytest.raises(ValueError, match=says("n_cepstra: 24", "n_mels = 23")):
        mfcc(torch.zeros(800), n_cepstra=24)
