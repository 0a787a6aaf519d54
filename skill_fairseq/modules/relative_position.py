"""Bucketed relative position of WavLM (Chen et al. 2022, section 3.1; buckets as in T5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def relative_position_bucket(offset: Tensor, num_buckets: int = 320, max_distance: int = 800) -> Tensor:
    """Bucket of a relative position: exact for short distances, logarithmic up to ``max_distance``.

    Args:
        offset: integer tensor, key position minus query position, in frames.
        num_buckets: number of buckets, half of them for each direction.
        max_distance: distance from which all positions share the last bucket.

    Returns:
        integer tensor of the same shape, values in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    scaled = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + scaled.to(torch.long)).clamp(max=half - 1)
    return (offset > 0).long() * half + torch.where(distance < exact, distance, far)


class RelativePosition(nn.Module):
    """The table that all layers share. It belongs to the encoder, not to its first layer, so pruning never removes it.

    Args:
        num_buckets, max_distance: see :func:`relative_position_bucket`.
        num_heads: heads before pruning.
    """

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.randn(num_buckets, num_heads))

    def forward(self, num_frames: int) -> Tensor:
        """Position bias of every head by offset, without building a (T, T) matrix.

        Returns:
            (H, 2T - 1) for T = ``num_frames``: entry [h, m] is the bias of a key T - 1 - m frames after the
            query, for offsets from T - 1 down to 1 - T.
        """
        offsets = torch.arange(num_frames - 1, -num_frames, -1, device=self.weight.device)
        buckets = relative_position_bucket(offsets, self.num_buckets, self.max_distance)
        return self.weight[buckets].t().contiguous()
