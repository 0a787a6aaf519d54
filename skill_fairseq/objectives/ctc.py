"""Connectionist temporal classification (CTC) of unit sequences, such as letters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import editdistance
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.labels.targets import NONE, Target
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.objectives.loss import at_least_float32
from skill_fairseq.objectives.objective import register_objective
from skill_fairseq.objectives.supervised import Supervised, SupervisedConfig, labelled

BLANK = 0
"""Index of the head's blank output; unit n is output n + 1."""


@dataclass
class CTCConfig(SupervisedConfig):
    """Labels and student layers."""


@register_objective("ctc", CTCConfig)
class CTC(Supervised):
    """Loss = -log p(units | utterance) per unit, over the utterances with units; p is a linear map of the states.

    Graves et al. 2006. An utterance with too few frames for its units counts as 0.

    Args:
        cfg: a :class:`CTCConfig`.
        student, teachers, field, targets: see :class:`Supervised`.
    """

    sequences = True

    def __init__(
        self,
        cfg: Any,
        student: EncoderConfig,
        teachers: Sequence[EncoderConfig],
        field: str,
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(cfg, student, teachers, field, targets)
        self.units = nn.Linear(student.encoder_embed_dim, len(self.target.classes) + 1)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`. The loss is a mean over units. Validation logs ``unit_error_rate`` of the best path
        (for letters, the letter error rate; the space between words is a unit)."""
        labels = self.labels(sample)
        log_probs = F.log_softmax(at_least_float32(self.units(self.states(student))), dim=-1)
        loss = ctc_loss(log_probs, labels, padding_mask)
        if self.training:
            return loss, {}
        heard, said = greedy_units(log_probs, padding_mask), [row[row != NONE].tolist() for row in labels.cpu()]
        errors = [editdistance.eval(*pair) for pair in zip(heard, said) if pair[1]]
        counts = torch.tensor([sum(errors), sum(map(len, said))], dtype=torch.float64, device=loss.device)
        return loss, {"unit_error_rate": counts}


def ctc_loss(log_probs: Tensor, labels: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """Negative log likelihood per unit: the sum over utterances with units, divided by their total number of units.

    Args:
        log_probs: (B, T, units + 1), output 0 is the blank.
        labels: (B, U) int64, units from 0, padded with -1.
        padding_mask: (B, T) bool, True = padding, or None.

    Returns:
        scalar; 0 where no utterance has units.
    """
    frames = log_probs.new_full((len(labels),), log_probs.size(1), dtype=torch.long)
    if padding_mask is not None:
        frames = (~padding_mask).sum(1)
    lengths = (labels != NONE).sum(1)
    losses = F.ctc_loss(
        log_probs.transpose(0, 1),
        labels.clamp(min=0) + 1,
        frames,
        lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return (losses * labelled(labels)).sum() / lengths.sum().clamp(min=1)


def greedy_units(log_probs: Tensor, padding_mask: Optional[Tensor] = None) -> List[List[int]]:
    """Units of the best path: repeats merged, then blanks removed.

    Args:
        log_probs: (B, T, units + 1), output 0 is the blank.
        padding_mask: (B, T) bool, True = padding, or None.

    Returns:
        the units of each utterance, from 0.
    """
    best = log_probs.argmax(-1)
    if padding_mask is not None:
        best = best.masked_fill(padding_mask, BLANK)
    return [(row[row != BLANK] - 1).tolist() for row in map(torch.unique_consecutive, best.cpu())]
