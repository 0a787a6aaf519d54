"""The calibration set: utterances of a manifest, and the teacher's layer distances on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.audio.manifest import Manifest, readable
from skill_fairseq.audio.pieces import pieces
from skill_fairseq.clustering.similarity import CHEAP_MEASURES, LayerSimilarity
from skill_fairseq.files import PathLike
from skill_fairseq.modules.encoder import SpeechEncoder


def choose_utterances(
    manifest: Manifest,
    max_seconds: float = float("inf"),
    max_utterances: int | None = None,
    seed: int = 0,
    sample_rate: int = 16000,
) -> list[int]:
    """Chooses random utterances, in the order to encode them.

    The result depends on paths, lengths and the seed, not on the manifest's order. Utterances of equal length are
    neighbours, so that they can share a batch; the lengths are in random order.

    Args:
        manifest: the utterances to choose from.
        max_seconds: total audio at most; an utterance that would exceed it is skipped.
        max_utterances: number of utterances at most; None: no limit.
        seed: seed of the choice.
        sample_rate: Hz of the manifest's sample counts.

    Returns:
        indices into the manifest.

    Raises:
        ValueError: no utterance fits the limits.
    """
    order = sorted(range(len(manifest)), key=lambda i: (manifest.paths[i], manifest.sizes[i]))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    left = max_seconds * sample_rate
    for i in order:
        if max_utterances is not None and len(chosen) >= max_utterances:
            break
        if manifest.sizes[i] <= left:
            chosen.append(i)
            left -= manifest.sizes[i]
    if not chosen:
        raise ValueError(
            f"calibration set: none of the {len(manifest)} utterances of {manifest.source} fits into "
            f"{max_seconds:g} s and {max_utterances} utterances; raise --max-seconds (the shortest has "
            f"{min(manifest.sizes) / sample_rate:.2f} s) or --max-utterances"
        )
    rank: dict[int, int] = {}
    for i in chosen:
        rank.setdefault(manifest.sizes[i], len(rank))
    return sorted(chosen, key=lambda i: rank[manifest.sizes[i]])


@torch.no_grad()
def layer_similarity(
    encoders: SpeechEncoder | Sequence[SpeechEncoder],
    files: Sequence[PathLike],
    measures: Sequence[str] = CHEAP_MEASURES,
    batch_size: int = 1,
    progress: Callable[[float], object] = lambda seconds: None,
    skipped: list[Path] | None = None,
) -> LayerSimilarity:
    """Encodes audio and measures the layers' distances.

    Neighbours of equal length share a batch. Nothing is padded, because padding changes the features of real frames
    if the extractor normalises over time (Base); so the batch size affects only float32 rounding. Recordings longer
    than a minute are encoded in pieces (:mod:`skill_fairseq.audio.pieces`), so memory does not depend on their length.

    Args:
        encoders: one or several, in eval mode, with the same waveforms and frames; all run on the first one's device.
            Layers of the second follow those of the first.
        files: mono audio at the encoders' sample rate.
        measures: see :mod:`skill_fairseq.clustering.similarity`.
        batch_size: at most this many utterances per batch.
        progress: called with the seconds of every finished batch.
        skipped: collects files that are missing, unfit or too short; the log says why.

    Raises:
        ValueError: no file can be read, or states are not finite; names the file.
    """
    similarity = LayerSimilarity(measures)
    encoders = [encoders] if isinstance(encoders, SpeechEncoder) else encoders
    encoder = encoders[0]
    device = next(encoder.parameters()).device
    for names, source in _batches(encoder, files, batch_size, [] if skipped is None else skipped):
        try:
            for piece in pieces(source, encoder.config.sample_rate):
                piece = piece.to(device)
                similarity.update([state for each in encoders for state in each(piece).hidden_states])
        except ValueError as error:
            raise ValueError(f"{', '.join(names)}: {error}") from error
        progress(source.numel() / encoder.config.sample_rate)
    return similarity


def _batches(
    encoder: SpeechEncoder, files: Sequence[PathLike], batch_size: int, skipped: list[Path]
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and (B, N) float32 samples of neighbours of equal length."""
    names: list[str] = []
    waves: list[Tensor] = []
    for file, wave in readable(files, skipped, encoder.config.sample_rate, encoder.config.receptive_field):
        if encoder.normalize:
            wave = F.layer_norm(wave, wave.shape)
        if waves and (len(waves) >= batch_size or len(wave) != len(waves[0])):
            yield names, torch.stack(waves)
            names, waves = [], []
        names.append(str(file))
        waves.append(wave)
    if waves:
        yield names, torch.stack(waves)
