"""The frozen teacher: kept outside model, criterion, optimiser and checkpoint."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.distillation.groups import GroupMeanAccumulator
from skill_fairseq.modules.encoder import SpeechEncoder


def averaged_states(
    hidden_states: Sequence[Tensor], groups: Sequence[Sequence[int]], normalize_states: bool = False
) -> List[Tensor]:
    """Mean state of each group, teacher and student alike.

    Args:
        hidden_states: (B, T, D) of each layer, from layer 0 on.
        groups: the layers of each group.
        normalize_states: bring every frame of every state to zero mean and unit variance over its features first,
            so that layers of large norm do not rule a group's mean.

    Returns:
        One (B, T, D) tensor a group.
    """
    means = GroupMeanAccumulator(groups)
    wanted = {layer for group in groups for layer in group}
    for layer, state in enumerate(hidden_states):
        if layer in wanted:
            means.add(layer, F.layer_norm(state, state.shape[-1:]) if normalize_states else state)
    return means.means()


class FrozenTeacher:
    """A teacher that is never trained, saved, half-cast or wrapped, because it is no submodule of anything.

    Args:
        encoder: the teacher.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.config = encoder.config

    @torch.no_grad()
    def group_means(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        groups: Sequence[Sequence[int]],
        normalize_states: bool = False,
    ) -> Tuple[List[Tensor], Optional[Tensor]]:
        """Runs the teacher up to the deepest layer that a group uses.

        Args:
            source: (B, N) samples; the teacher moves to their device and sees them in float32.
            padding_mask: (B, N) bool, True = padding, or None.
            groups: layers of each group.
            normalize_states: see :func:`averaged_states`.

        Returns:
            (B, T, D) a group, and the (B, T) padding mask of the frames or None.
        """
        self.encoder.to(source.device)
        with torch.autocast(source.device.type, enabled=False):
            out = self.encoder(source.float(), padding_mask, last_layer=max(map(max, groups)))
        return averaged_states(out.hidden_states, groups, normalize_states), out.padding_mask
