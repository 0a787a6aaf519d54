"""From recordings to vectors: mean and standard deviation over time of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from skill_fairseq.audio.manifest import readable

Features = Callable[[Tensor], Sequence[Tensor]]
"""(N,) samples to one (T, D) tensor a layer."""


def temporal_statistics(states: Sequence[Tensor]) -> Tensor:
    """Mean and (biased) standard deviation over time.

    Args:
        states: one (T, D) tensor a layer.

    Returns:
        (layers, 2 D) float32: the means, then the standard deviations; those are 0 where T = 1.
    """
    stacked = torch.stack([state.float() for state in states])
    return torch.cat([stacked.mean(1), stacked.std(1, unbiased=False)], dim=1)


class EncoderFeatures:
    """The hidden states of an encoder.

    One recording at a time: no padding, so that neither batch nor order can change a number.

    Args:
        encoder: as `skill_fairseq.load_encoder` gives it; is put in eval mode.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder.eval()
        self.device = next(encoder.parameters()).device

    @torch.no_grad()
    def __call__(self, wave: Tensor) -> list[Tensor]:
        """(N,) samples to L + 1 tensors (T, D)."""
        if self.encoder.normalize:
            wave = F.layer_norm(wave, wave.shape)
        out = self.encoder(wave[None].to(self.device))
        return [state[0].cpu() for state in out.hidden_states]


def pool_files(features: Features, files: Iterable[Path], description: str = "pooling") -> dict[Path, np.ndarray]:
    """Statistics of every recording, each computed once however often it is named.

    Args:
        features: see `Features`.
        files: audio, 16 kHz mono.
        description: beside the progress bar.

    Returns:
        (layers, 2 D) float32 of each file that can be read; the log names the others.

    Raises:
        ValueError: no recording can be read, or features are not finite.
    """
    pooled: dict[Path, np.ndarray] = {}
    for file, wave in readable(tqdm(list(dict.fromkeys(files)), desc=description, unit="file", disable=None), []):
        statistics = temporal_statistics(features(wave)).numpy()
        if not np.isfinite(statistics).all():
            raise ValueError(
                f"{file}: the model ({description}) gives features that are NaN or infinite, expected "
                "finite numbers; its weights may be damaged"
            )
        pooled[file] = statistics
    return pooled
