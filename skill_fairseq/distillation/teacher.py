"""The frozen teacher: kept outside model, criterion, optimiser and checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.distillation.groups import GroupMeanAccumulator
from skill_fairseq.modules.encoder import SpeechEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions a teacher may run in."""


def averaged_states(
    hidden_states: Iterable[Tensor], groups: Sequence[Sequence[int]], normalize_states: bool = False
) -> List[Tensor]:
    """Mean state of each group, teacher and student alike.

    Args:
        hidden_states: (B, T, D) of each layer, from layer 0 on. An iterator is not asked for more than is needed, and
            no state is kept but in its group's sum.
        groups: the layers of each group.
        normalize_states: bring every frame of every state to zero mean and unit variance over its features first,
            so that layers of large norm do not rule a group's mean.

    Returns:
        One (B, T, D) tensor a group.
    """
    means = GroupMeanAccumulator(groups)
    wanted = {layer for group in groups for layer in group}
    for layer, state in zip(range(max(wanted) + 1), hidden_states):
        if layer in wanted:
            means.add(layer, F.layer_norm(state, state.shape[-1:]) if normalize_states else state)
    return means.means()


class FrozenTeacher:
    """A teacher that is never trained, saved, half-cast or wrapped, because it is no submodule of anything.

    Args:
        encoder: the teacher; it is taken over and converted.
        dtype: precision that it runs in, a key of :data:`DTYPES`.
        compile: run its layers through ``torch.compile``, which takes some minutes at the start.

    Raises:
        ValueError: the precision is unknown, or this torch cannot compile.
    """

    def __init__(self, encoder: SpeechEncoder, dtype: str = "fp32", compile: bool = False) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"teacher precision: {dtype!r}; expected one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self.encoder = encoder.to(self.dtype).requires_grad_(False).prepare()
        self.config = encoder.config
        if compile:
            if not hasattr(torch.nn.Module, "compile"):
                raise ValueError(f"torch {torch.__version__} cannot compile a teacher; install torch 2.2 or later")
            for layer in self.encoder.transformer.layers:
                layer.compile(dynamic=True)

    def group_means(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        groups: Sequence[Sequence[int]],
        normalize_states: bool = False,
    ) -> Tuple[List[Tensor], Optional[Tensor]]:
        """Runs the teacher up to the deepest layer that a group uses.

        Args:
            source: (B, N) samples; the teacher moves to their device.
            padding_mask: (B, N) bool, True = padding, or None.
            groups: layers of each group.
            normalize_states: see :func:`averaged_states`.

        Returns:
            (B, T, D) float32 a group, and the (B, T) padding mask of the frames or None.
        """
        if next(self.encoder.parameters()).device != source.device:
            self.encoder.to(source.device).prepare()
        with torch.inference_mode(), torch.autocast(source.device.type, enabled=False):
            states, padding_mask = self.encoder.states(source, padding_mask)
            means = averaged_states(states, groups, normalize_states)
        # Copies: what was made in inference mode cannot enter a graph.
        copies = [mean.to(torch.float32, copy=True) for mean in means]
        return copies, None if padding_mask is None else padding_mask.clone()
