"""Layers of the student against layers of the teacher, through heads.

DistilHuBERT's prediction heads (arXiv:2110.01900), and layer to layer as in Deep versus Wide (arXiv:2207.06867).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.groups import is_sequence, map_groups
from skill_fairseq.objectives.loss import check_distance, distillation_loss, parse_weights, without_padding
from skill_fairseq.objectives.objective import Objective, choose_normalization, register_objective, the_teacher


@dataclass
class PairsConfig:
    """Pairs of layers, for objectives that compare one with one."""

    teacher_layers: Optional[Any] = field(
        default=None,
        metadata={
            "help": "the teacher's layers, such as [4,8,12]; null: for each of the student's the one at the same share "
            "of the depth"
        },
    )
    student_layers: Any = field(
        default="same",
        metadata={
            "help": "same: at the same share of the depth; last: the last one for all; or a layer for each of the "
            "teacher's"
        },
    )


@dataclass
class StatePairsConfig(PairsConfig):
    """Pairs of layers whose states are compared."""

    normalize_states: Optional[bool] = field(
        default=None,
        metadata={
            "help": "layer-normalise every state first; null: where the teacher's layers begin with their LayerNorm, "
            "whose states grow large"
        },
    )


@dataclass
class LayersConfig(StatePairsConfig):
    """Pairs of layers, heads and distance."""

    layer_weights: Optional[Any] = field(
        default=None,
        metadata={"help": "weight of each pair, or a number for all; null: 1 / number of pairs, the mean"},
    )
    head: str = field(
        default="linear",
        metadata={
            "help": "identity; linear: one for each pair; prediction: one linear map of the student's layer for all, "
            "GELU, then a linear map each"
        },
    )
    l1_weight: float = field(default=1.0, metadata={"help": "weight of the L1 term"})
    mse_weight: float = field(default=0.0, metadata={"help": "weight of the squared distance"})
    cos_weight: float = field(default=1.0, metadata={"help": "weight of the cosine term"})
    cos_type: str = field(default="raw", metadata={"help": "raw: -mean cos; log_sig: -mean log sigmoid(cos)"})


@register_objective("layers", LayersConfig)
class Layers(Objective):
    """loss = sum over pairs of w [a mean|h(s) - t| + b mean (h(s) - t)^2 + c C(h(s), t)], with a head h for each pair.

    Args:
        cfg: a :class:`LayersConfig`; the layers that it leaves open are written into it.
        student, teachers, field: see :class:`Objective`.

    Raises:
        ValueError: layers, weights or heads are not usable; names the field.
    """

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        self.cfg = cfg
        check_distance(cfg, field)
        teacher = the_teacher(teachers, field)
        self.pairs = pair_layers(cfg, student, teacher, field)
        self.student_taps, self.teacher_taps = pair_taps(cfg, self.pairs, teacher)
        weights, count = cfg.layer_weights, len(self.pairs)
        weights = [weights] * count if isinstance(weights, (int, float)) else weights
        self.weights = parse_weights(weights, count, f"{field}.layer_weights", "pair of layers")
        if cfg.head not in HEADS:
            raise ValueError(f"{field}.head: {cfg.head!r}; expected one of {', '.join(HEADS)}")
        own, theirs = student.encoder_embed_dim, teacher.encoder_embed_dim
        if cfg.head == "identity" and own != theirs:
            raise ValueError(
                f"{field}.head: identity, but the student's width is {own} and the teacher's {theirs}; expected equal "
                "ones, or linear"
            )
        if cfg.head == "prediction" and len({s for s, _ in self.pairs}) > 1:
            raise ValueError(
                f"{field}.head: prediction, which reads one layer of the student, but {field}.student_layers is "
                f"{list(cfg.student_layers)}; set that to last, or the head to linear"
            )
        self.heads = HEADS[cfg.head](own, theirs, count)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; logged are ``l1_sI_tJ``, ``mse_sI_tJ`` and ``cos_sI_tJ`` of student layer I and
        teacher layer J, the last of them the mean of cos or log sigmoid(cos)."""
        predicted = self.heads(student)
        if padding_mask is not None:
            frames = without_padding([*predicted, *teacher], padding_mask)
            predicted, teacher = frames[: len(predicted)], frames[len(predicted) :]
        cfg = self.cfg
        distance = (None, cfg.l1_weight, cfg.cos_weight, cfg.cos_type, cfg.mse_weight)
        parts = [distillation_loss(p, t, *distance) for p, t in zip(predicted, teacher)]
        loss = torch.stack([w * part.total for w, part in zip(self.weights, parts)]).sum()
        log = {}
        for (s, t), part in zip(self.pairs, parts):
            values = {"l1": part.l1, "mse": part.mse, "cos": -part.cos}
            log.update({f"{n}_s{s}_t{t}": v for n, v in values.items() if getattr(cfg, f"{n}_weight")})
        return loss, log

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        names = ("teacher_layers", "student_layers", "head", "normalize_states")
        return {n: list(v) if is_sequence(v) else v for n, v in cfg.items() if n in names and v is not None}


class LayerHeads(nn.ModuleList):
    """A head of its own for each pair: N states (B, T, D_S) to N predictions (B, T, D_T)."""

    def forward(self, states: Sequence[Tensor]) -> List[Tensor]:
        """Each state through its head."""
        return [head(state) for head, state in zip(self, states)]


class PredictionHeads(nn.Module):
    """DistilHuBERT's: prediction n is ``W_n gelu(V h)_n + b_n``, (V h)_n the n-th D_S features of one linear map of h.

    All weights start as torch's linear maps do, U(+-1/sqrt(D_S)), as in its code.

    Args:
        student, teacher: widths D_S and D_T.
        count: predictions N.
    """

    def __init__(self, student: int, teacher: int, count: int) -> None:
        super().__init__()
        self.shared = nn.Linear(student, student * count)
        self.heads = nn.ModuleList(nn.Linear(student, teacher) for _ in range(count))

    def forward(self, states: Sequence[Tensor]) -> List[Tensor]:
        """``states`` are the same (B, T, D_S) one for each of the N predictions (B, T, D_T)."""
        parts = F.gelu(self.shared(states[0])).chunk(len(self.heads), dim=-1)
        return [head(part) for head, part in zip(self.heads, parts)]


HEADS: Dict[str, Callable[[int, int, int], nn.Module]] = {
    "identity": lambda student, teacher, count: LayerHeads(nn.Identity() for _ in range(count)),
    "linear": lambda student, teacher, count: LayerHeads(nn.Linear(student, teacher) for _ in range(count)),
    "prediction": PredictionHeads,
}
"""By name: makes a module that turns the student's N states into N predictions, from both widths and N."""

Pairs = List[Tuple[int, int]]


def pair_layers(cfg: Any, student: EncoderConfig, teacher: EncoderConfig, field: str, first: int = 1) -> Pairs:
    """Which layer of the student learns from which of the teacher.

    Args:
        cfg: with ``teacher_layers`` and ``student_layers``, see :class:`PairsConfig`. Both become lists.
        student, teacher: shapes.
        field: where ``cfg`` stands, for messages.
        first: first layer of the student where both fields are open.

    Returns:
        (student layer, teacher layer), one at least.

    Raises:
        ValueError: a field is no list of layers that the encoder has, lists differ in length, or a pair is named twice.
    """
    own, theirs = cfg.student_layers, cfg.teacher_layers
    depths = student.encoder_layers, teacher.encoder_layers
    if theirs is not None:
        theirs = _layers(theirs, depths[1], f"{field}.teacher_layers")
    if own == "last":
        own = [depths[0]] * (1 if theirs is None else len(theirs))
    elif own == "same":
        own = list(range(first, depths[0] + 1)) if theirs is None else _in_proportion(theirs, depths[1], depths[0])
    else:
        own = _layers(own, depths[0], f"{field}.student_layers", "same, last or ")
    if theirs is None:
        theirs = _in_proportion(own, *depths)
    if len(own) != len(theirs):
        raise ValueError(
            f"{field}.student_layers: {own}; expected {len(theirs)} layers, one for each of {field}.teacher_layers: "
            f"{theirs}"
        )
    pairs = list(zip(own, theirs))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"{field}.teacher_layers: {theirs} with student layers {own}; expected each pair once")
    cfg.student_layers, cfg.teacher_layers = own, theirs
    return pairs


def pair_taps(cfg: Any, pairs: Pairs, teacher: EncoderConfig) -> Tuple[List[Tap], List[Tap]]:
    """The states of student and teacher, one for each pair; fills in ``cfg.normalize_states``."""
    choose_normalization(cfg, [teacher])
    own, theirs = ([Tap((i,), normalize=cfg.normalize_states) for i in layers] for layers in zip(*pairs))
    return own, theirs


def _in_proportion(layers: Sequence[int], depth: int, other: int) -> List[int]:
    return [layer for (layer,) in map_groups(tuple((layer,) for layer in layers), [depth], other)]


def _layers(value: Any, depth: int, field: str, or_else: str = "") -> List[int]:
    if not is_sequence(value) or not value or any(type(i) is not int or not 0 <= i <= depth for i in value):
        example = f"layers from 0 to {depth}, such as [1, {depth}]"
        raise ValueError(f"{field}: {value}; expected {or_else}a list of {example}")
    return list(value)
