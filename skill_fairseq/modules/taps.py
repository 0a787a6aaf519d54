"""What is asked of an encoder's forward pass: hidden states, their means over layers, attention maps."""

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
"""Called with the projected features (B, T, D) and their padding mask (B, T) or None; returns features (B, T, D)."""

KINDS = ("states", "mean_map", "maps")


@dataclass(frozen=True)
class SpanMasking:
    """How spans of frames are chosen that the Transformer does not hear, as fairseq's ``compute_mask_indices`` does.

    Equal ones hide the same frames of an utterance for every reader: student, teachers, several objectives.

    Attributes:
        prob: share of the frames to hide; less where spans overlap or do not fit.
        length: frames of a span; the mean where lengths vary.
        selection: "static": each of this length; "uniform": from ``other`` to twice the length; "normal", with the
            standard deviation ``other``; "poisson".
        other: see ``selection``.
        no_overlap: spans neither overlap nor touch.
        min_space: frames between two of them then.
    """

    prob: float
    length: int = 10
    selection: str = "static"
    other: float = 0.0
    no_overlap: bool = False
    min_space: int = 1


@dataclass(frozen=True)
class Tap:
    """One tensor that a forward pass hands out: the mean of what some layers compute.

    The mean over one layer is that layer's own tensor. Means are taken in at least float32 (a sum of layers can
    overflow float16), and have the layers' type again.

    Attributes:
        layers: which ones. States are numbered from 0, which precedes the positional convolution; attention maps and
            other states from 1, after Transformer layer i.
        kind: "states" (B, T, D), before a final LayerNorm; "mean_map" (B, T, T), the attention map averaged over the
            heads whose gates are open; "maps" (B, H, T, T), the maps of all heads that the layer has.
        normalize: bring every frame of every state to zero mean and unit variance over its features first, so that
            layers of large norm do not rule the mean.
        transform: changes the projected features, as masking does. Taps with equal transforms (and
            ``adapters``) share a pass through the Transformer; the convolutions run once for all.
        teacher: which of several teachers is asked, from 0; nothing to the encoder itself.
        adapters: with the encoder's adapters, where it has any, or without; the passes differ then.
        masking: in training some frames are hidden, see :func:`skill_fairseq.modules.masking.with_masks`, which turns
            it into a transform; nothing to the encoder itself.
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
        ValueError: an encoder of this shape does not have it.
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
            raise ValueError(f"layers: {headless} have no attention map, all their heads are pruned; ask other layers")


class AttentionMaps(NamedTuple):
    """The attention of one layer.

    Attributes:
        heads: (B, H, T, T) softmaxes before dropout, [b, h, i, j] from query i to key j.
        gate: (H,) the heads' gates; None without gates.
    """

    heads: Tensor
    gate: Tensor | None

    def mean(self) -> Tensor:
        """(B, T, T) mean over the heads whose gates are open; over all where none is."""
        if self.gate is None:
            return self.heads.mean(1)
        is_open = (self.gate > 0).to(self.heads.dtype)
        is_open = torch.where(is_open.any(), is_open, torch.ones_like(is_open))
        return (self.heads * is_open[:, None, None]).sum(1) / is_open.sum()


def deepest(taps: Iterable[Tap]) -> int:
    """The last layer that is asked for, 0 where none is."""
    return max((layer for tap in taps for layer in tap.layers), default=0)


def map_layers(taps: Iterable[Tap]) -> set[int]:
    """The layers whose attention maps are asked for."""
    return {layer for tap in taps if tap.kind != "states" for layer in tap.layers}


def collect(taps: Sequence[Tap], layers: Iterable[tuple[Tensor, AttentionMaps | None]]) -> list[Tensor]:
    """Takes what is asked for out of a pass.

    Args:
        taps: what is asked for; their transforms are not looked at.
        layers: the (B, T, D) state of each layer, from layer 0 on, and its attention maps where they are asked for. It
            is not read beyond the deepest tap. Without gradients no state is kept but in sums.

    Returns:
        a tensor for each tap, differentiable.
    """
    sums: list[Any] = [None] * len(taps)
    dtypes: list[Any] = [None] * len(taps)
    layers = itertools.islice(layers, deepest(taps) + 1)
    if torch.is_grad_enabled():
        layers = list(layers)  # kept for the backward pass anyway, where sums of gradients begin with the deepest
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
