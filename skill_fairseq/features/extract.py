"""Features of one recording: states of any encoder, or MFCC and log-mel energies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.audio.features import log_mel, mfcc
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.kernels import setting

FIXED: dict[str, Callable[[Tensor], Tensor]] = {"mfcc": mfcc, "logmel": log_mel}
"""Features without weights, by name: 39 MFCC (13 with two differences) or 80 log-mel energies every 10 ms."""


@dataclasses.dataclass(frozen=True)
class FixedFeatures:
    """MFCC or log-mel energies, as one layer.

    Attributes:
        name: key of :data:`FIXED`.
    """

    name: str

    @property
    def width(self) -> int:
        """Features per frame."""
        return {"mfcc": 39, "logmel": 80}[self.name]

    def __call__(self, wave: Tensor) -> Iterator[list[np.ndarray]]:
        """(N,) samples to the one piece [(T, width)]."""
        yield [FIXED[self.name](wave).numpy()]


class StateFeatures:
    """Hidden states of chosen layers.

    A recording of at most one chunk is encoded as a whole, a longer one with
    :meth:`skill_fairseq.modules.encoder.SpeechEncoder.stream`, whose memory does not grow with length.

    Args:
        encoder: the encoder; it is prepared for inference.
        layers: 0 to the encoder's depth; 0 is before the positional convolution.
        chunk_seconds, context_seconds: see ``stream``.

    Raises:
        ValueError: the encoder has no such layer.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        layers: Sequence[int],
        chunk_seconds: float = 60.0,
        context_seconds: float = 10.0,
    ) -> None:
        depth = encoder.config.encoder_layers
        if not layers or any(not 0 <= layer <= depth for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"layers: {list(layers)}; expected layers from 0 to {depth}, each at most once")
        # Every process must compute the same bits: the shards of a manifest come from several.
        self.encoder, self.layers = encoder.prepare(setting("plain")), list(layers)
        self.chunk_seconds, self.context_seconds = chunk_seconds, context_seconds
        self.device = next(encoder.parameters()).device

    @property
    def width(self) -> int:
        """Features per frame."""
        return self.encoder.config.encoder_embed_dim

    def __call__(self, wave: Tensor) -> Iterator[list[np.ndarray]]:
        """(N,) samples to consecutive pieces of the recording, each a (t, D) array per layer."""
        wave = F.layer_norm(wave, wave.shape) if self.encoder.normalize else wave
        last = max(self.layers)
        if len(wave) <= self.chunk_seconds * self.encoder.config.sample_rate:
            with torch.no_grad():
                states = self.encoder(wave[None].to(self.device), last_layer=last).hidden_states
            yield [states[layer][0].cpu().numpy() for layer in self.layers]
            return
        for out in self.encoder.stream(wave, self.chunk_seconds, self.context_seconds, last):
            yield [out.hidden_states[layer][0].cpu().numpy() for layer in self.layers]
