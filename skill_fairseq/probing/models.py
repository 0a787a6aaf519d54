"""Models for `skill-probe`: encoder files, the same shapes with random weights, and log-mel features."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor

from skill_fairseq.audio.features import log_mel
from skill_fairseq.files import content_sha256
from skill_fairseq.probing.pooling import EncoderFeatures, Features

LOG_MEL = "logmel"
RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class ProbedModel:
    """A model and its name in the table.

    Attributes:
        name: name in table, JSON and plot.
        features: samples to hidden states.
        parameters: number of parameters; None for log-mel, which has none.
        kind: "encoder", "random" (weights) or "logmel".
        sha256: hash of the file or folder; None for log-mel.
    """

    name: str
    features: Features
    parameters: int | None
    kind: str
    sha256: str | None


def level_free_log_mel(wave: Tensor) -> list[list[Tensor]]:
    """(N,) samples to [[(T, 80)]], log-mel features less their mean over the recording, which cancels gain.

    Encoders whose first convolution is normalised over time ignore gain as well; without this the baseline would
    mostly measure how loudly a speaker was recorded.
    """
    energies = log_mel(wave)
    return [[energies - energies.mean()]]


def resolve_model(word: str, device: str = "cpu", seed: int = 0) -> ProbedModel:
    """The model that a command-line word describes.

    Args:
        word: `logmel`, a file or folder for `skill_fairseq.load_encoder`, or `random:FILE` for the shape of
            FILE with fresh random weights; a prefix `NAME=` sets its name in the table.
        device: device of the encoders.
        seed: seed of random weights.

    Returns:
        see `ProbedModel`.

    Raises:
        FileNotFoundError, ValueError: no such file, or not an encoder.
    """
    name, what = word, word
    if "=" in word and not os.path.exists(word.partition(RANDOM)[2] if word.startswith(RANDOM) else word):
        name, _, what = word.partition("=")
    if what == LOG_MEL:
        return ProbedModel(name, level_free_log_mel, None, LOG_MEL, None)
    path = what[len(RANDOM) :] if what.startswith(RANDOM) else what
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: no such model file; expected a file or folder that load_encoder reads, {RANDOM}FILE, or {LOG_MEL}"
        )
    from skill_fairseq import load_encoder

    encoder = load_encoder(path, device=device)
    if what.startswith(RANDOM):
        torch.manual_seed(seed)
        encoder = type(encoder)(encoder.config).to(device)
    kind = "random" if what.startswith(RANDOM) else "encoder"
    return ProbedModel(name, EncoderFeatures(encoder), encoder.num_parameters(), kind, content_sha256(path))
