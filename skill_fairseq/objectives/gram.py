"""STaR's objectives, which compare relations between frames instead of the frames (arXiv:2312.09040)."""

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
    """Layers (all from 0 where both fields are null) and the weights of the two terms."""

    layer_weight: float = field(default=1.0, metadata={"help": "weight of the layer-wise term"})
    intra_weight: float = field(default=1.0, metadata={"help": "weight of the intra-layer term"})


@register_objective("gram", GramConfig)
class TemporalGram(Objective):
    """Temporal Gram matrices: loss = a mean over pairs i of |X_i X_i^T - Y_i Y_i^T|^2 + b mean over neighbours of
    |X_{i-1} X_i^T - Y_{i-1} Y_i^T|^2, where X_i (T, D_S) and Y_i (T, D_T) are the states of the i-th pair of layers.

    ``|.|^2`` is the mean of :func:`gram_distance`. It needs no heads: the matrices are (T, T) for any widths. For N
    pairs they take 2 N - 1 times B T^2 float32 numbers of memory.

    Args:
        cfg: a :class:`GramConfig`; null fields are filled in.
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
                f"{field}.intra_weight: {cfg.intra_weight}, but there is only one pair of layers, in "
                f"{field}.teacher_layers: {list(cfg.teacher_layers)}; expected at least two, or a weight of 0"
            )
        self.student_taps, self.teacher_taps = pair_taps(cfg, pairs, teacher)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; logs the unweighted terms ``layer_wise`` and ``intra_layer``."""
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

    With padding, every real frame has the same weight, and so has every real frame of its utterance that it is compared
    with: the value does not depend on which utterances share a batch.

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
    # Entries are sums over features, and small differences of large entries matter: no half precision, no TF32.
    with torch.autocast(x.device.type, enabled=False), exact_products(x.device):
        difference = x @ u.transpose(1, 2) - y @ v.transpose(1, 2)
    squares = difference.square().sum((1, 2))
    return (squares / frames.clamp(min=1)).sum() / frames.sum()


@register_objective("attention_maps", PairsConfig)
class AttentionMaps(Objective):
    """Sum over pairs of layers of :func:`attention_distance`; STaR's paper tried it and left it out.

    Args:
        cfg: a :class:`PairsConfig`; null fields are filled in.
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
        """See :class:`Objective`; logs only the loss."""
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
    tiny = torch.finfo(own.dtype).tiny  # for padded keys both are 0
    return (torch.xlogy(theirs, theirs) - torch.xlogy(theirs, own.clamp(min=tiny))).sum(-1).mean()
