"""Requests to an encoder's forward pass: hidden states, their means over layers, attention maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig

FrameTransform = Callable[[Tensor, "Tensor | None"], Tensor]
"""Maps the projected features (B, T, D) and their padding mask (B, T) or None to features (B, T, D)."""

KINDS = ("states", "mean_map", "maps")


@dataclass(frozen=True)
class SpanMasking:
    """How to choose spans of masked frames, as in fairseq's ``compute_mask_indices``.

    Equal maskings mask the same frames of an utterance for student, teachers and all objectives.

    Attributes:
        prob: share of the frames to mask; less if spans overlap or do not fit.
        length: frames per span; the mean if lengths vary.
        selection: "static": this length; "uniform": from ``other`` to twice the length; "normal", with the standard
            deviation ``other``; "poisson".
        other: see ``selection``.
        no_overlap: spans neither overlap nor touch.
        min_space: frames between two spans, with ``no_overlap``.
    """

    prob: float
    length: int = 10
    selection: str = "static"
    other: float = 0.0
    no_overlap: bool = False
    min_space: int = 1


@dataclass(frozen=True)
class Tap:
    """A tensor to return from a forward pass: the mean of the outputs of some layers.

    The mean over one layer is that layer's own tensor. Means are computed in at least float32 (a sum of layers can
    overflow float16) and cast back to the layers' dtype.

    Attributes:
        layers: the layers. State 0 precedes the positional convolution; states and attention maps from 1 belong to
            Transformer layer i.
        kind: "states" (B, T, D), before a final LayerNorm; "mean_map" (B, T, T), the attention map averaged over the
            heads whose gates are open; "maps" (B, H, T, T), the maps of all heads of the layer.
        normalize: first normalise every frame of every state to zero mean and unit variance over its features, so that
            layers of large norm do not dominate the mean.
        transform: changes the projected features, for example by masking. Taps with equal transforms (and
            ``adapters``) share a pass through the Transformer; the convolutions run once for all.
        teacher: number of the teacher, from 0; ignored by the encoder.
        adapters: run with or without the encoder's adapters, if any, in separate passes.
        masking: frames to mask in training; :func:`skill_fairseq.modules.masking.with_masks` turns it into a
            transform; ignored by the encoder.
    """

    layers: tuple[int, ...]
    kind: str = "states"
    normalize: bool = False
    transform: FrameTransform | None = None
    teacher: int = 0
    masking: SpanMasking | None = None
    adapters: bool = True

    def check(self, config: EncoderConfig) -> None:
        """Raises:
        ValueError: an encoder of this shape cannot return it.
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r}; expected one of {', '.join(KINDS)}")
        first = 0 if self.kind == "states" else 1
        if not self.layers or any(not first <= layer <= config.encoder_layers for layer in self.layers):
            raise ValueError(
                f"layers: {list(self.layers)} of kind {self.kind}; expected at least one, from {first} to "
                f"{config.encoder_layers}"
            )
        assert config.heads is not None
        headless = [layer for layer in self.layers if first == 1 and not config.heads[layer - 1]]
        if headless:
            raise ValueError(
                f"layers: {headless} have no attention map, because all their heads are pruned; choose other layers"
            )


class AttentionMaps(NamedTuple):
    """The attention of one layer.

    Attributes:
        heads: (B, H, T, T) softmaxes before dropout, [b, h, i, j] from query i to key j.
        gate: (H,), the heads' gates, or None.
    """

    heads: Tensor
    gate: Tensor | None

    def mean(self) -> Tensor:
        """(B, T, T) mean over heads with open gates, or over all heads if none is open."""
        if self.gate is None:
            return self.heads.mean(1)
        is_open = (self.gate > 0).to(self.heads.dtype)
        is_open = torch.where(is_open.any(), is_open, torch.ones_like(is_open))
        return (self.heads * is_open[:, None, None]).sum(1) / is_open.sum()


def deepest(taps: Iterable[Tap]) -> int:
    """The deepest requested layer, 0 if there is none."""
    return max((layer for tap in taps for layer in tap.layers), default=0)


def map_layers(taps: Iterable[Tap]) -> set[int]:
    """The layers whose attention maps are requested."""
    return {layer for tap in taps if tap.kind != "states" for layer in tap.layers}


def collect(taps: Sequence[Tap], layers: Iterable[tuple[Tensor, AttentionMaps | None]]) -> list[Tensor]:
    """Collects the requested tensors from a pass.

    Args:
        taps: the requests; their transforms are ignored.
        layers: yields the (B, T, D) state of each layer, from layer 0, and its attention maps if requested. It is not
            read beyond the deepest tap. Without gradients, states are only kept in sums.

    Returns:
        a tensor for each tap, differentiable.
    """
    sums: list[Any] = [None] * len(taps)
    dtypes: list[Any] = [None] * len(taps)
    layers = itertools.islice(layers, deepest(taps) + 1)
    if torch.is_grad_enabled():
        layers = list(layers)  # kept for the backward pass anyway, which sums gradients from the deepest
    for layer, (state, maps) in enumerate(layers):
        normalized = None
        for index, tap in enumerate(taps):
            if layer not in tap.layers:
                continue
            if tap.kind == "states" and tap.normalize:
                normalized = F.layer_norm(state, state.shape[-1:]) if normalized is None else normalized
                value = normalized
            elif tap.kind == "states":
                value = state
            else:
                assert maps is not None
                value = maps.mean() if tap.kind == "mean_map" else maps.heads
            dtypes[index] = value.dtype
            if len(tap.layers) > 1 and value.dtype in (torch.float16, torch.bfloat16):
                value = value.float()
            sums[index] = value if sums[index] is None else sums[index] + value
        del state, maps, normalized
    return [
        total if len(tap.layers) == 1 else (total / len(tap.layers)).to(dtype)
        for tap, total, dtype in zip(taps, sums, dtypes)
    ]
