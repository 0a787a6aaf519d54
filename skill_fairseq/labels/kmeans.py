"""Units by k-means on MFCC, as in HuBERT's first iteration, or on the states of an encoder's layer."""

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
    """The features to cluster, one tensor per recording; recordings longer than a minute are encoded in pieces.

    Args:
        files: mono audio at the encoder's sample rate.
        encoder: the encoder whose states to use; None: MFCC at 16 kHz, less their mean over the recording, 100 frames
            per second.
        layer: the encoder's layer, from 0.

    Yields:
        (T, D) float32 on the CPU.
    """
    for file in files:
        if encoder is None:
            cepstra = mfcc(load_audio(file))
            yield (cepstra - cepstra.mean(0)).float()  # removes the channel's effect
            continue
        rate, least = encoder.config.sample_rate, encoder.config.receptive_field
        wave = load_audio(file, rate, least).to(next(encoder.parameters()).device)
        if encoder.normalize:
            wave = F.layer_norm(wave, wave.shape)
        parts = [encoder(part, last_layer=layer).hidden_states[layer][0] for part in pieces(wave[None], rate)]
        yield torch.cat(parts).float().cpu()


def fit(frames: np.ndarray, units: int, codebooks: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, list[float]]:
    """Mini-batch k-means on features of unit variance; each further codebook clusters the residuals.

    Args:
        frames: (F, D) float32.
        units: K, centroids per codebook.
        codebooks: N, number of codebooks.
        seed: seed of the initial centroids and of the batches.

    Returns:
        centroids (N, K, D) and scale (D,), see :func:`skill_fairseq.labels.codebook.assign`; and for each codebook the
        share of the variance that remains after it.

    Raises:
        ValueError: there are fewer frames than units.
    """
    from sklearn.cluster import MiniBatchKMeans

    if len(frames) < units:
        raise ValueError(
            f"--vocabulary-size: {units}, but there are {len(frames)} frames; give more audio, or fewer units"
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
    """The units of a recording's (T, D) features, one line of numbers per codebook."""
    return [" ".join(map(str, row)) for row in assign(frames, centroids, scale).t().tolist()]
