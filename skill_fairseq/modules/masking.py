"""Frames that are hidden from the Transformer: which ones, how they are hidden, and in which passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skill_fairseq.modules.taps import SpanMasking, Tap


class HideFrames:
    """Puts the mask embedding in place of the masked frames, after the projection; see ``Tap.transform``.

    Args:
        masked: (B, T) bool, True = hidden.
        embedding: (D,).
    """

    def __init__(self, masked: Tensor, embedding: Tensor) -> None:
        self.masked = masked
        self.embedding = embedding

    def __call__(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) projected features to the same with hidden frames.

        Raises:
            ValueError: there are other frames than the mask has.
        """
        if x.shape[:2] != self.masked.shape:
            raise ValueError(
                f"masked: shape {tuple(self.masked.shape)} for features of shape {tuple(x.shape)}; expected a mask for "
                "(batch, frames): student and teacher must make as many frames of an utterance"
            )
        return torch.where(self.masked.unsqueeze(-1), self.embedding.to(x), x)


def with_masks(taps: Sequence[Tap], masked: Mapping[SpanMasking, Tensor], embedding: Tensor | None) -> list[Tap]:
    """The taps of one forward pass: where a mask has been drawn for a tap's ``masking``, its frames are hidden.

    Taps of one masking have one transform, and so share a pass. Those whose masking has none hear everything.

    Args:
        taps: what is asked for.
        masked: (B, T) bool for each masking, True = hidden; empty in validation.
        embedding: (D,), what stands in place of hidden frames.

    Raises:
        ValueError: frames are to be hidden, and there is no embedding.
    """
    if embedding is None and any(tap.masking in masked for tap in taps):
        raise ValueError("this encoder has no mask embedding, so that no frame can be hidden from it")
    hide = {masking: HideFrames(mask, embedding) for masking, mask in masked.items() if embedding is not None}
    return [
        tap if tap.masking is None else dataclasses.replace(tap, transform=hide.get(tap.masking), masking=None)
        for tap in taps
    ]
