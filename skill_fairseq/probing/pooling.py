"""Features of recordings: mean and standard deviation over time of every layer, or all of its frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from skill_fairseq.audio.manifest import readable
from skill_fairseq.audio.pieces import pieces
from skill_fairseq.modules.encoder import SpeechEncoder

Features = Callable[[Tensor], Iterable[Sequence[Tensor]]]
"""(N,) samples to the states of their pieces, in order: one (T, D) tensor per layer."""


def temporal_statistics(parts: Iterable[Sequence[Tensor]]) -> Tensor:
    """Mean and (biased) standard deviation over time.

    Args:
        parts: pieces of a recording, one (T, D) tensor per layer; pieces are not kept in memory.

    Returns:
        (layers, 2 D) float32: the means, then the standard deviations, which are 0 if T = 1 in total.
    """
    lengths, means, deviations = [], [], []
    for states in parts:
        stacked = torch.stack([state.float() for state in states])
        lengths.append(float(stacked.size(1)))
        means.append(stacked.mean(1))
        deviations.append(stacked.std(1, unbiased=False))
    if len(lengths) == 1:
        return torch.cat([means[0], deviations[0]], dim=1)
    shares = (torch.tensor(lengths, dtype=torch.float64) / sum(lengths))[:, None, None]
    mean = (shares * torch.stack(means)).sum(0)
    square = (shares * (torch.stack(deviations).double().square() + (torch.stack(means) - mean).square())).sum(0)
    return torch.cat([mean, square.sqrt()], dim=1).float()


class EncoderFeatures:
    """The hidden states of an encoder.

    Runs one recording at a time, without padding, so results depend neither on batches nor on their order.

    Args:
        encoder: an encoder from `skill_fairseq.load_encoder`; it is put in eval mode.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder.eval()
        self.device = next(encoder.parameters()).device

    def __call__(self, wave: Tensor) -> Iterator[list[Tensor]]:
        """(N,) samples to L + 1 tensors (T, D) for each piece of at most a minute."""
        if self.encoder.normalize:
            wave = F.layer_norm(wave, wave.shape)
        for piece in pieces(wave[None], self.encoder.config.sample_rate):
            with torch.no_grad():
                states = self.encoder(piece.to(self.device)).hidden_states
            yield [state[0].cpu() for state in states]


def pool_files(features: Features, files: Iterable[Path], description: str = "pooling") -> dict[Path, np.ndarray]:
    """Statistics of every recording, computed once even if it is named several times.

    Args:
        features: see `Features`.
        files: audio, 16 kHz mono.
        description: label of the progress bar.

    Returns:
        (layers, 2 D) float32 for each readable file; the log names the others.

    Raises:
        ValueError: no recording can be read, or features are not finite.
    """
    pooled: dict[Path, np.ndarray] = {}
    for file, wave in _each(files, description):
        pooled[file] = _finite(temporal_statistics(features(wave)), file, description).numpy()
    return pooled


def frames_of(features: Features, files: Iterable[Path], description: str = "encoding") -> dict[Path, Tensor]:
    """Every frame of every recording in float16: 2 bytes times layers times width, 50 times per second.

    Returns:
        (layers, T, D) for each readable file; the log names the others.

    Raises:
        ValueError: no recording can be read, or features are not finite.
    """
    found: dict[Path, Tensor] = {}
    for file, wave in _each(files, description):
        parts = [torch.stack([state.float() for state in states]) for states in features(wave)]
        found[file] = _finite(torch.cat(parts, dim=1).half(), file, description)
    return found


def _each(files: Iterable[Path], description: str) -> Iterator[tuple[Path, Tensor]]:
    return readable(tqdm(list(dict.fromkeys(files)), desc=description, unit="file", disable=None), [])


def _finite(values: Tensor, file: Path, description: str) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(
            f"{file}: the model ({description}) gives features that are NaN or infinite, expected "
            "finite numbers; its weights may be damaged"
        )
    return values
