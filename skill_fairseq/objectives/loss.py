"""The distance between the student's and the teacher's representations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COS_TYPES = ("raw", "log_sig")


class LossParts(NamedTuple):
    """Scalars, float32 (float64 for float64 input). Parts are unweighted, and 0 where the weight is 0."""

    total: Tensor
    l1: Tensor
    cos: Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    padding_mask: Tensor | None = None,
    l1_weight: float = 1.0,
    cos_weight: float = 1.0,
    cos_type: str = "raw",
) -> LossParts:
    """Weighted sum of L1 and cosine terms (DistilHuBERT, arXiv:2110.01900, eq. 1; DPHuBERT, eq. 1).

    L1 is the mean over the features of all frames outside the padding, the cosine term over the frames. Lower precision
    is raised to float32 first.

    Args:
        student: (B, T, D) or, with the padding gone, (N, D), projected to the teacher's dimension.
        teacher: of the same shape.
        padding_mask: (B, T) bool, True for padding; None: there is none.
        l1_weight: weight of ``mean |student - teacher|``.
        cos_weight: weight of the cosine term.
        cos_type: "raw" for ``-mean cos``, "log_sig" for ``-mean log sigmoid(cos)``.

    Raises:
        ValueError: if shapes differ, every frame is padding, or ``cos_type`` is unknown.
    """
    if cos_type not in COS_TYPES:
        raise ValueError(f"cos_type is {cos_type!r}, but must be one of {', '.join(COS_TYPES)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}, but they must agree; "
            "give both the same audio and project the student to the teacher's dimension"
        )
    student, teacher = _at_least_float32(student), _at_least_float32(teacher)
    if padding_mask is not None:
        student, teacher = without_padding([student, teacher], padding_mask)

    l1 = cos = student.new_zeros(())
    if l1_weight:
        l1 = F.l1_loss(student, teacher)
    if cos_weight:
        similarity = F.cosine_similarity(student, teacher, dim=-1)
        cos = -(similarity if cos_type == "raw" else F.logsigmoid(similarity)).mean()
    return LossParts(l1_weight * l1 + cos_weight * cos, l1, cos)


def _at_least_float32(states: Tensor) -> Tensor:
    return states.float() if states.dtype in (torch.float16, torch.bfloat16) else states


def without_padding(states: Sequence[Tensor], padding_mask: Tensor) -> list[Tensor]:
    """Frames outside the padding. Selecting, unlike weighting, also stops NaNs there.

    Args:
        states: (B, T, ...) each.
        padding_mask: (B, T) bool, True for padding.

    Returns:
        (N, ...) each; the host waits for N once.

    Raises:
        ValueError: if shapes differ, or every frame is padding.
    """
    for frames in states:
        if padding_mask.shape != frames.shape[:2]:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)}, but must have {tuple(frames.shape[:2])}: "
                "batch and frames (not samples)"
            )
    index = (~padding_mask).flatten().nonzero().flatten()
    if not len(index):
        raise ValueError("padding_mask marks every frame of the batch as padding; leave such batches out")
    return [frames.flatten(0, 1).index_select(0, index) for frames in states]
