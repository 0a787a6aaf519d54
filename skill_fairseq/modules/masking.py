"""Masks frames before the Transformer, for the passes that need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skill_fairseq.modules.taps import SpanMasking, Tap


class HideFrames:
    """Replaces masked frames by the mask embedding, after the projection; see ``Tap.transform``.

    Args:
        masked: (B, T) bool, True = masked.
        embedding: (D,).
    """

    def __init__(self, masked: Tensor, embedding: Tensor) -> None:
        self.masked = masked
        self.embedding = embedding

    def __call__(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Masks frames of the (B, T, D) projected features.

        Raises:
            ValueError: features and mask differ in frames.
        """
        if x.shape[:2] != self.masked.shape:
            raise ValueError(
                f"masked: shape {tuple(self.masked.shape)} for features of shape {tuple(x.shape)}; expected a mask for "
                "(batch, frames): student and teacher must have equally many frames per utterance"
            )
        return torch.where(self.masked.unsqueeze(-1), self.embedding.to(x), x)


def with_masks(taps: Sequence[Tap], masked: Mapping[SpanMasking, Tensor], embedding: Tensor | None) -> list[Tap]:
    """The taps of one forward pass, with the transforms that mask the frames drawn for each tap's ``masking``.

    Taps with the same masking have the same transform, and so share a pass. Taps whose masking has no mask are not
    masked.

    Args:
        taps: the taps.
        masked: (B, T) bool for each masking, True = masked; empty in validation.
        embedding: (D,), the mask embedding.

    Raises:
        ValueError: there are masks but no embedding.
    """
    if embedding is None and any(tap.masking in masked for tap in taps):
        raise ValueError("this encoder has no mask embedding, so it cannot run with masked frames")
    hide = {masking: HideFrames(mask, embedding) for masking, mask in masked.items() if embedding is not None}
    return [
        tap if tap.masking is None else dataclasses.replace(tap, transform=hide.get(tap.masking), masking=None)
        for tap in taps
    ]
