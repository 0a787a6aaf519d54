"""The calibration set: choosing utterances of a manifest, and the teacher's layer distances on them."""

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
    """A random choice of utterances, and the order to encode them in.

    Both depend on paths, lengths and the seed, not on the manifest's order. Utterances of one length stand
    side by side, so that they may share a batch, and the lengths themselves in random order.

    Args:
        manifest: what to choose from.
        max_seconds: most audio in all; an utterance that would exceed it is passed over.
        max_utterances: most utterances; None: no limit.
        seed: of the choice.
        sample_rate: Hz of the manifest's sample counts.

    Returns:
        indices into the manifest.

    Raises:
        ValueError: nothing is left within the limits.
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

    Neighbours in the list that have the same length share a batch. Nothing is ever padded, because padding
    changes the features of real frames where the extractor normalises over time (Base): so the batch size
    changes nothing but the rounding of the encoder's own float32. Recordings of more than a minute are encoded in
    pieces (:mod:`skill_fairseq.audio.pieces`), in memory that does not depend on their length.

    Args:
        encoders: one or several, in eval mode, of the same waveforms and frames; the first one's device is used.
            Layers of the second stand after those of the first.
        files: mono audio at the encoders' sample rate.
        measures: see :mod:`skill_fairseq.clustering.similarity`.
        batch_size: most utterances of one length to encode together.
        progress: called with the seconds of every batch done.
        skipped: gets every file that is missing, unfit or too short; the log says why.

    Raises:
        ValueError: no file can be read, or states are not finite; the file is named.
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
    """Names and (B, N) float32 samples of neighbours of one length."""
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
