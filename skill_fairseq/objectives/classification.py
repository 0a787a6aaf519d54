"""Utterance classification: pooled states, linear maps, and a softmax with or without an additive angular margin."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.labels.targets import NONE, Target
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.objectives.loss import at_least_float32
from skill_fairseq.objectives.objective import register_objective
from skill_fairseq.objectives.supervised import Supervised, SupervisedConfig, labelled, pool

POOLINGS = ("mean", "mean_std")


@dataclass
class ClassificationConfig(SupervisedConfig):
    """Pooling, embedding and class weights."""

    pooling: str = field(
        default="mean", metadata={"help": "over time: mean, or mean_std: mean and unbiased standard deviation"}
    )
    embedding_dim: int = field(
        default=0,
        metadata={"help": "width of a linear layer with batch normalisation between pooling and classes; 0: none"},
    )
    class_weights: bool = field(
        default=False, metadata={"help": "weight each class by N / n: n of the N training utterances belong to it"}
    )


@dataclass
class AAMSoftmaxConfig(ClassificationConfig):
    """Margin and scale."""

    margin: float = field(default=0.2, metadata={"help": "margin added to the angle to the true class, radians"})
    scale: float = field(default=30.0, metadata={"help": "factor of the cosines"})


@register_objective("classification", ClassificationConfig)
class Classification(Supervised):
    """Cross-entropy of a linear map of the pooled states, averaged over the utterances that have a label.

    Args:
        cfg: a :class:`ClassificationConfig`.
        student, teachers, field, targets: see :class:`Supervised`.

    Raises:
        ValueError: a field is not usable; names it.
    """

    def __init__(
        self,
        cfg: Any,
        student: EncoderConfig,
        teachers: Sequence[EncoderConfig],
        field: str,
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(cfg, student, teachers, field, targets)
        if cfg.pooling not in POOLINGS:
            raise ValueError(f"{field}.pooling: {cfg.pooling!r}; expected one of {', '.join(POOLINGS)}")
        if cfg.embedding_dim < 0:
            raise ValueError(f"{field}.embedding_dim: {cfg.embedding_dim}; expected a number of at least 0")
        width = student.encoder_embed_dim * (2 if cfg.pooling == "mean_std" else 1)
        self.embedding = Embedding(width, cfg.embedding_dim) if cfg.embedding_dim else None
        self.build_classes(cfg.embedding_dim or width, len(self.target.classes), field)
        self.class_weights: Optional[Tensor] = None
        if cfg.class_weights:
            total = sum(self.target.counts)
            self.class_weights = torch.tensor([total / count for count in self.target.counts])

    def build_classes(self, width: int, count: int, field: str) -> None:
        """Creates the class parameters."""
        self.classes = nn.Linear(width, count)

    def logits(self, embeddings: Tensor, labels: Optional[Tensor]) -> Tensor:
        """(B, E) embeddings to (B, C) logits; with labels, the logits that the loss uses."""
        return self.classes(embeddings)

    def embed(self, student: Sequence[Tensor], padding_mask: Optional[Tensor] = None) -> Tensor:
        """(B, E) embeddings of the states of ``student_taps``, (B, T, D) each."""
        pooled = pool(self.states(student), padding_mask, self.cfg.pooling == "mean_std")
        # Half-precision weights need input of their own type; fairseq has cast the student's states to it too.
        pooled = pooled.to(next(self.parameters()).dtype)
        return pooled if self.embedding is None else self.embedding(pooled)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`. The loss is a mean over utterances; logs ``accuracy``."""
        labels = self.labels(sample)
        embeddings = self.embed(student, padding_mask)
        weights = self.class_weights
        if weights is not None:
            weights = weights.to(embeddings.device)
        loss = cross_entropy(self.logits(embeddings, labels), labels, weights)
        with torch.no_grad():
            there = labelled(labels)
            right = (self.logits(embeddings, None).argmax(1) == labels) & there
            accuracy = torch.stack([right.sum(), there.sum()]).double()
        return loss, {"accuracy": accuracy}

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        names = ("pooling", "embedding_dim")
        return {**super().settings(cfg), **{name: cfg[name] for name in names if name in cfg}}


@register_objective("aam_softmax", AAMSoftmaxConfig)
class AAMSoftmax(Classification):
    """Cross-entropy of scaled cosines with an additive angular margin at the true class (ArcFace, arXiv:1801.07698),
    the usual loss for speaker verification.

    Args:
        cfg: an :class:`AAMSoftmaxConfig`.
        student, teachers, field, targets: see :class:`Supervised`.

    Raises:
        ValueError: a field is not usable; names it.
    """

    def build_classes(self, width: int, count: int, field: str) -> None:
        """Creates one direction per class."""
        if not 0 <= self.cfg.margin < math.pi / 2:
            raise ValueError(f"{field}.margin: {self.cfg.margin}; expected a number from 0 to below pi / 2")
        if not 0 < self.cfg.scale < math.inf:
            raise ValueError(f"{field}.scale: {self.cfg.scale}; expected a number above 0")
        self.directions = nn.Parameter(torch.empty(count, width))
        nn.init.xavier_normal_(self.directions)

    def logits(self, embeddings: Tensor, labels: Optional[Tensor]) -> Tensor:
        """See :class:`Classification`."""
        margin = 0.0 if labels is None else self.cfg.margin
        return aam_logits(embeddings, self.directions, labels, margin, self.cfg.scale)


class Embedding(nn.Module):
    """A linear map, then batch normalisation over utterances; a batch of one uses the running statistics.

    Args:
        width: input features.
        dim: output features.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) to (B, E)."""
        x = self.linear(x)
        if self.training and len(x) == 1:
            norm = self.norm
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return self.norm(x)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """Weighted mean over the utterances that have a label: sum of w_y (-log softmax_y) over the sum of w_y.

    Args:
        logits: (B, C).
        labels: (B,) int64, -1 = none.
        weights: (C,) of the classes, or None for 1.

    Returns:
        scalar, in at least float32; 0 where no utterance has a label.
    """
    logits = at_least_float32(logits)
    weights = torch.ones_like(logits[0]) if weights is None else weights.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weights, ignore_index=NONE, reduction="sum")
    counted = weights[labels.clamp(min=0)] * labelled(labels)
    return total / counted.sum().clamp(min=torch.finfo(logits.dtype).tiny)


def aam_logits(
    embeddings: Tensor, directions: Tensor, labels: Optional[Tensor], margin: float, scale: float, beyond: bool = True
) -> Tensor:
    """s cos(theta_c), and s cos(theta_y + m) for the true class.

    Args:
        embeddings: (B, E).
        directions: (C, E), one per class.
        labels: (B,) int64, -1 = none; None: no margin.
        margin: m, radians.
        scale: s.
        beyond: where theta_y + m exceeds pi, use cos(theta_y) - m sin(m), which keeps decreasing.

    Returns:
        (B, C), in at least float32.
    """
    cosine = F.linear(F.normalize(at_least_float32(embeddings)), F.normalize(at_least_float32(directions)))
    if labels is None:
        return scale * cosine
    own = cosine.gather(1, labels.clamp(min=0).unsqueeze(1))
    sine = (1.0 - own.square()).clamp(min=1e-12).sqrt()
    moved = own * math.cos(margin) - sine * math.sin(margin)
    if beyond:
        moved = torch.where(own > math.cos(math.pi - margin), moved, own - margin * math.sin(margin))
    return scale * cosine.scatter(1, labels.clamp(min=0).unsqueeze(1), moved)
