"""Costs of an encoder."""

from __future__ import annotations

import time
from typing import Any

import torch

from skill_fairseq.modules.encoder import SpeechEncoder

SECONDS = 10.0
"""Length of audio, seconds, for MACs and time."""


@torch.no_grad()
def costs(encoder: SpeechEncoder, seconds: float = SECONDS, repeats: int = 7) -> dict[str, Any]:
    """Size, work and time of a forward.

    Args:
        encoder: any encoder; it is prepared for inference.
        seconds: length of the utterance.
        repeats: timed forwards, after one warm-up.

    Returns:
        ``parameters``; ``macs``; ``cpu_seconds``, the minimum over repeats of the processor time of all threads, as
        other processes can only add to it; ``threads``.
    """
    encoder.prepare()
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(1, round(seconds * encoder.config.sample_rate), generator=generator)
    encoder(wave)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        encoder(wave)
        times.append(time.process_time() - began)
    return {
        "parameters": encoder.num_parameters(),
        "macs": encoder.macs(seconds),
        "cpu_seconds": min(times),
        "seconds_of_audio": seconds,
        "threads": torch.get_num_threads(),
    }
