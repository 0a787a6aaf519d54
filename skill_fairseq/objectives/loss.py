"""The distance between the student's and the teacher's representations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.objectives.groups import is_sequence

COS_TYPES = ("raw", "log_sig")
DISTANCES = ("l1_weight", "mse_weight", "cos_weight")
"""Config fields with the weights of the terms of :func:`distillation_loss`."""


class LossParts(NamedTuple):
    """Scalars, float32 (float64 for float64 input). Parts are unweighted, and 0 where the weight is 0."""

    total: Tensor
    l1: Tensor
    cos: Tensor
    mse: Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    padding_mask: Tensor | None = None,
    l1_weight: float = 1.0,
    cos_weight: float = 1.0,
    cos_type: str = "raw",
    mse_weight: float = 0.0,
) -> LossParts:
    """Weighted sum of L1, cosine (DistilHuBERT, arXiv:2110.01900, eq. 1; DPHuBERT, eq. 1) and squared distance.

    L1 and squared distance are means over features and non-padding frames; the cosine term is a mean over non-padding
    frames. Half precision is cast to float32 first.

    Args:
        student: (B, T, D), or (N, D) without padding, projected to the teacher's dimension.
        teacher: same shape.
        padding_mask: (B, T) bool, True = padding, or None.
        l1_weight: weight of ``mean |student - teacher|``.
        cos_weight: weight of the cosine term.
        cos_type: "raw" for ``-mean cos``, "log_sig" for ``-mean log sigmoid(cos)``.
        mse_weight: weight of ``mean (student - teacher)^2``.

    Raises:
        ValueError: shapes differ, every frame is padding, or ``cos_type`` is unknown.
    """
    if cos_type not in COS_TYPES:
        raise ValueError(f"cos_type is {cos_type!r}, but must be one of {', '.join(COS_TYPES)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}, but they must be equal; "
            "give both the same audio and project the student to the teacher's dimension"
        )
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if padding_mask is not None:
        student, teacher = without_padding([student, teacher], padding_mask)

    l1 = cos = mse = student.new_zeros(())
    if l1_weight:
        l1 = F.l1_loss(student, teacher)
    if cos_weight:
        similarity = F.cosine_similarity(student, teacher, dim=-1)
        cos = -(similarity if cos_type == "raw" else F.logsigmoid(similarity)).mean()
    total = l1_weight * l1 + cos_weight * cos
    if mse_weight:
        mse = F.mse_loss(student, teacher)
        total = total + mse_weight * mse
    return LossParts(total, l1, cos, mse)


def check_distance(cfg: Any, field: str) -> None:
    """Checks the fields of :data:`DISTANCES` that a config has, and ``cos_type``.

    Raises:
        ValueError: see :func:`check_weights`, or ``cos_type`` is unknown; names the field.
    """
    check_weights(cfg, [name for name in DISTANCES if hasattr(cfg, name)], field)
    if cfg.cos_type not in COS_TYPES:
        raise ValueError(f"{field}.cos_type: {cfg.cos_type!r}; expected one of {', '.join(COS_TYPES)}")


def check_weights(cfg: Any, names: Sequence[str], field: str) -> None:
    """Raises:
    ValueError: one of these fields of ``cfg`` is negative or not finite, or all are 0; names the field.
    """
    for name in names:
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"{field}.{name}: {getattr(cfg, name)}; expected a number of at least 0")
    if not any(getattr(cfg, name) for name in names):
        others = ", ".join(f"{field}.{name}" for name in names[1:])
        raise ValueError(f"{field}.{names[0]}: 0, like {others}, so nothing is distilled; raise one")


def parse_weights(value: Any, count: int, field: str, of: str) -> list[float]:
    """Weights of the terms of a sum.

    Args:
        value: one for each term, or None for 1 / count each.
        count: number of terms.
        field: where the value comes from, for messages.
        of: what each term belongs to, for messages.

    Raises:
        ValueError: the value is not ``count`` finite numbers of at least 0, or all are 0.
    """
    if value is None:
        return [1 / count] * count
    value = list(value) if is_sequence(value) else value
    weights = [w for w in value if isinstance(w, (int, float))] if isinstance(value, list) else []
    if len(weights) != count or not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise ValueError(f"{field}: {value}; expected {count} numbers >= 0, not all 0, one for each {of}")
    return weights


def at_least_float32(states: Tensor) -> Tensor:
    """Casts half precision to float32; other types do not change."""
    return states.float() if states.dtype in (torch.float16, torch.bfloat16) else states


def without_padding(states: Sequence[Tensor], padding_mask: Tensor) -> list[Tensor]:
    """Selects the frames outside the padding. Unlike weighting, this also drops NaNs in the padding.

    Args:
        states: (B, T, ...) each.
        padding_mask: (B, T) bool, True = padding.

    Returns:
        (N, ...) each; the host synchronises once, for N.

    Raises:
        ValueError: shapes differ, or every frame is padding.
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
