"""STaR's objectives: how frames relate to each other, in place of what they hold (arXiv:2312.09040)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.modules.tf32 import exact_products
from skill_fairseq.objectives.layers import PairsConfig, StatePairsConfig, pair_layers, pair_taps
from skill_fairseq.objectives.loss import at_least_float32, check_weights, without_padding
from skill_fairseq.objectives.objective import Objective, register_objective, the_teacher


@dataclass
class GramConfig(StatePairsConfig):
    """Layers, where both fields are null all from 0 on, and the two terms."""

    layer_weight: float = field(default=1.0, metadata={"help": "weight of the layer-wise term"})
    intra_weight: float = field(default=1.0, metadata={"help": "weight of the intra-layer term"})


@register_objective("gram", GramConfig)
class TemporalGram(Objective):
    """Temporal Gram matrices: loss = a mean over pairs of |X_i X_i^T - Y_i Y_i^T|^2 + b mean over neighbours i of
    |X_{i-1} X_i^T - Y_{i-1} Y_i^T|^2, X_i (T, D_S) and Y_i (T, D_T) the states of the i-th pair of layers.

    ``|.|^2`` is the mean of :func:`gram_distance`. No heads: the matrices are (T, T) whatever the widths. Memory
    for them is 2 N - 1 times B T^2 float32 numbers for N pairs.

    Args:
        cfg: a :class:`GramConfig`; what it leaves open is written into it.
        student, teachers, field: see :class:`Objective`.

    Raises:
        ValueError: layers or weights are not usable; names the field.
    """

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        self.cfg = cfg
        check_weights(cfg, ("layer_weight", "intra_weight"), field)
        teacher = the_teacher(teachers, field)
        pairs = pair_layers(cfg, student, teacher, field, first=0)
        if cfg.intra_weight and len(pairs) < 2:
            raise ValueError(
                f"{field}.intra_weight: {cfg.intra_weight}, but there is one pair of layers alone, in "
                f"{field}.teacher_layers: {list(cfg.teacher_layers)}; expected two at least, or a weight of 0"
            )
        self.student_taps, self.teacher_taps = pair_taps(cfg, pairs, teacher)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; logged are ``layer_wise`` and ``intra_layer``, the unweighted terms."""
        pairs = list(zip(student, teacher))
        loss, log = student[0].new_zeros((), dtype=torch.float32), {}
        for name, weight, before in (
            ("layer_wise", self.cfg.layer_weight, pairs),
            ("intra_layer", self.cfg.intra_weight, pairs[:-1]),
        ):
            if weight:
                after = pairs[len(pairs) - len(before) :]
                terms = [gram_distance((x, u), (y, v), padding_mask) for (x, y), (u, v) in zip(before, after)]
                log[name] = torch.stack(terms).mean()
                loss = loss + weight * log[name]
        return loss, log


def gram_distance(
    student: Tuple[Tensor, Tensor], teacher: Tuple[Tensor, Tensor], padding_mask: Optional[Tensor] = None
) -> Tensor:
    """Mean of ``(X U^T - Y V^T)^2`` over the entries of the (T, T) matrices, a scalar of at least float32.

    With padding, each frame outside it weighs the same, and so does each other frame of its utterance: the value does
    not depend on which utterances share a batch.

    Args:
        student: X, U, each (B, T, D_S).
        teacher: Y, V, each (B, T, D_T).
        padding_mask: (B, T) bool, True = padding, or None.
    """
    batch, length, _ = student[0].shape
    states = [at_least_float32(state) for state in (*student, *teacher)]
    frames = states[0].new_full((batch,), length)
    if padding_mask is not None:
        states = [state.masked_fill(padding_mask[..., None], 0.0) for state in states]
        frames = (~padding_mask).sum(1).to(states[0].dtype)
    x, u, y, v = states
    # Entries are sums of squares over features, and differences of large ones matter: no half precision, no TF32.
    with torch.autocast(x.device.type, enabled=False), exact_products(x.device):
        difference = x @ u.transpose(1, 2) - y @ v.transpose(1, 2)
    squares = difference.square().sum((1, 2))
    return (squares / frames.clamp(min=1)).sum() / frames.sum()


@register_objective("attention_maps", PairsConfig)
class AttentionMaps(Objective):
    """loss = sum over pairs of layers of :func:`attention_distance`, tried and left out by STaR's paper.

    Args:
        cfg: a :class:`PairsConfig`; what it leaves open is written into it.
        student, teachers, field: see :class:`Objective`.

    Raises:
        ValueError: layers are not usable; names the field.
    """

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        pairs = pair_layers(cfg, student, the_teacher(teachers, field), field)
        self.student_taps, self.teacher_taps = ([Tap((i,), "mean_map") for i in layers] for layers in zip(*pairs))

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; nothing but the loss is logged."""
        return torch.stack([attention_distance(s, t, padding_mask) for s, t in zip(student, teacher)]).sum(), {}


def attention_distance(student: Tensor, teacher: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """Mean over query frames of KL(teacher || student), a scalar of at least float32.

    Args:
        student, teacher: (B, T, T) attention averaged over heads, rows sum to 1.
        padding_mask: (B, T) bool, True = padding, or None.
    """
    rows = [at_least_float32(maps) for maps in (student, teacher)]
    if padding_mask is not None:
        rows = without_padding(rows, padding_mask)
    own, theirs = rows
    tiny = torch.finfo(own.dtype).tiny  # of keys that are padding both are 0
    return (torch.xlogy(theirs, theirs) - torch.xlogy(theirs, own.clamp(min=tiny))).sum(-1).mean()
