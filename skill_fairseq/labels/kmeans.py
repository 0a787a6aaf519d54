"""Units by k-means: of MFCC, as in HuBERT's first round, or of the states of an encoder's layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.audio.features import mfcc
from skill_fairseq.audio.manifest import load_audio
from skill_fairseq.audio.pieces import pieces
from skill_fairseq.labels.codebook import assign
from skill_fairseq.modules.encoder import SpeechEncoder

BATCH = 10_000  # frames


@torch.no_grad()
def features(files: Sequence[Path], encoder: SpeechEncoder | None = None, layer: int = 0) -> Iterator[Tensor]:
    """What is clustered, of each recording; those of more than a minute are encoded in pieces.

    Args:
        files: mono audio at the encoder's sample rate.
        encoder: whose states; None: MFCC at 16 kHz, their mean over the recording subtracted, 100 frames a second.
        layer: of the encoder, from 0.

    Yields:
        (T, D) float32 on the CPU.
    """
    for file in files:
        if encoder is None:
            cepstra = mfcc(load_audio(file))
            yield (cepstra - cepstra.mean(0)).float()  # less of the channel, more of the sound
            continue
        rate, least = encoder.config.sample_rate, encoder.config.receptive_field
        wave = load_audio(file, rate, least).to(next(encoder.parameters()).device)
        if encoder.normalize:
            wave = F.layer_norm(wave, wave.shape)
        parts = [encoder(part, last_layer=layer).hidden_states[layer][0] for part in pieces(wave[None], rate)]
        yield torch.cat(parts).float().cpu()


def fit(frames: np.ndarray, units: int, codebooks: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, list[float]]:
    """k-means, in mini-batches, of features of unit variance; each further codebook is of what is left of the frames.

    Args:
        frames: (F, D) float32.
        units: K, of each codebook.
        codebooks: N.
        seed: of the first centroids and of the batches.

    Returns:
        centroids (N, K, D) and scale (D,), see :func:`skill_fairseq.labels.codebook.assign`; and of each codebook
        the share of the variance that is left behind it.

    Raises:
        ValueError: there are fewer frames than units.
    """
    from sklearn.cluster import MiniBatchKMeans

    if len(frames) < units:
        raise ValueError(
            f"--vocabulary-size: {units}, but there are {len(frames)} frames; give more audio, or less units"
        )
    scale = np.maximum(frames.std(0), 1e-6).astype(np.float32)
    mean = frames.mean(0)
    rest, found, left = (frames - mean) / scale, [], []
    for n in range(codebooks):
        kmeans = MiniBatchKMeans(units, batch_size=BATCH, n_init=5, max_iter=200, random_state=seed + n).fit(rest)
        centroids = kmeans.cluster_centers_.astype(np.float32)
        rest = rest - centroids[kmeans.predict(rest)]
        found.append(centroids * scale + (mean if n == 0 else 0))
        left.append(float(np.square(rest).mean()))
    return torch.from_numpy(np.stack(found)).float(), torch.from_numpy(scale), left


def unit_lines(frames: Tensor, centroids: Tensor, scale: Tensor) -> list[str]:
    """The units of a recording's (T, D) features, a line of numbers for each codebook."""
    return [" ".join(map(str, row)) for row in assign(frames, centroids, scale).t().tolist()]
