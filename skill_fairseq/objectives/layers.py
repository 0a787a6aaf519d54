"""Distance between layers of the student and of the teacher, through heads.

DistilHuBERT (arXiv:2110.01900); layer to layer as in Deep versus Wide (arXiv:2207.06867) and FitHuBERT (2207.00555);
and masking distillation as in MaskHuBERT and ARMHuBERT (arXiv:2305.11685).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.groups import is_sequence, map_groups
from skill_fairseq.objectives.heads import HEADS
from skill_fairseq.objectives.loss import check_distance, distillation_loss, parse_weights, without_padding
from skill_fairseq.objectives.masking import MaskingConfig, masked_frames, parse_masking
from skill_fairseq.objectives.objective import Objective, choose_normalization, register_objective, the_teacher


@dataclass
class PairsConfig:
    """Pairs of layers, for objectives that compare layer to layer."""

    teacher_layers: Optional[Any] = field(
        default=None,
        metadata={
            "help": "the teacher's layers, such as [4,8,12]; null: for each of the student's, the one at the same "
            "relative depth"
        },
    )
    student_layers: Any = field(
        default="same",
        metadata={
            "help": "same: at the same relative depth; last: the last one for all; or one layer for each of the "
            "teacher's"
        },
    )


@dataclass
class StatePairsConfig(PairsConfig):
    """Pairs of layers whose states are compared."""

    normalize_states: Optional[bool] = field(
        default=None,
        metadata={
            "help": "layer-normalise every state first; null: only for teachers with pre-LayerNorm layers, whose "
            "states grow large"
        },
    )


@dataclass
class LayersConfig(MaskingConfig, StatePairsConfig):
    """Pairs of layers, heads, distance, and masked frames of the student."""

    layer_weights: Optional[Any] = field(
        default=None,
        metadata={
            "help": "weight of each pair, a number for all, or {last: 1.0, others: 0.1}; null: the mean, "
            "1 / number of pairs"
        },
    )
    head: str = field(
        default="linear",
        metadata={
            "help": "identity; linear: one for each pair; prediction: one linear map of the student's layer for all, "
            "GELU, then a linear map each; upsample_linear: a transposed convolution back to the teacher's frame rate, "
            "then a linear map, for each pair"
        },
    )
    l1_weight: float = field(default=1.0, metadata={"help": "weight of the L1 term"})
    mse_weight: float = field(default=0.0, metadata={"help": "weight of the squared distance"})
    cos_weight: float = field(default=1.0, metadata={"help": "weight of the cosine term"})
    cos_type: str = field(default="raw", metadata={"help": "raw: -mean cos; log_sig: -mean log sigmoid(cos)"})
    cos_reduction: str = field(
        default="mean",
        metadata={"help": "cosine term: mean over frames, or sum over the frames of an utterance (OS-KDFT's code)"},
    )
    masked_frames: Optional[str] = field(
        default="whole",
        metadata={
            "help": "target of the student's masked frames: the teacher run on the whole utterance (whole) or with the "
            "same frames masked (masked); null: none"
        },
    )
    unmasked_frames: Optional[str] = field(
        default="masked", metadata={"help": "target of its other frames: whole, masked or null"}
    )


@register_objective("layers", LayersConfig)
class Layers(Objective):
    """Loss = sum over pairs of w [a mean|h(s) - t| + b mean (h(s) - t)^2 + c C(h(s), t)], with a head h for each pair.

    With ``mask_prob`` above 0 some of the student's frames are masked in training, and t is chosen per frame: masking
    distillation takes t of masked frames from the teacher run on the whole utterance, and t of the other frames from
    the teacher run with the same frames masked. Frames without a target count as 0 in the means.

    Args:
        cfg: a :class:`LayersConfig`; null layers are filled in.
        student, teachers, field: see :class:`Objective`.

    Raises:
        ValueError: layers, weights or heads are not usable; names the field.
    """

    any_rate = True

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        self.cfg = cfg
        check_distance(cfg, field)
        if cfg.cos_reduction not in ("mean", "sum"):
            raise ValueError(f"{field}.cos_reduction: {cfg.cos_reduction!r}; expected mean or sum")
        if cfg.cos_reduction == "sum" and cfg.mask_prob:
            raise ValueError(f"{field}.cos_reduction: sum with {field}.mask_prob={cfg.mask_prob}; expected mean")
        teacher = the_teacher(teachers, field)
        self.pairs = pair_layers(cfg, student, teacher, field)
        self.student_taps, self.teacher_taps = pair_taps(cfg, self.pairs, teacher)
        count = len(self.pairs)
        self.weights = _layer_weights(cfg.layer_weights, count, f"{field}.layer_weights")
        self._read_masking(field)
        if student.time_reduction % teacher.time_reduction:
            raise ValueError(
                f"model.time_reduction: {student.time_reduction}, but the teacher has {teacher.time_reduction}; "
                "expected a multiple of that"
            )
        self.rate = student.time_reduction // teacher.time_reduction
        if cfg.head not in HEADS:
            raise ValueError(f"{field}.head: {cfg.head!r}; expected one of {', '.join(HEADS)}")
        own, theirs = student.encoder_embed_dim, teacher.encoder_embed_dim
        if cfg.head == "identity" and own != theirs:
            raise ValueError(
                f"{field}.head: identity, but the student's width is {own} and the teacher's {theirs}; expected equal "
                "widths, or linear"
            )
        if cfg.head == "prediction" and len({s for s, _ in self.pairs}) > 1:
            raise ValueError(
                f"{field}.head: prediction, which reads one layer of the student, but {field}.student_layers is "
                f"{list(cfg.student_layers)}; set that to last, or the head to linear"
            )
        if (self.rate > 1) != (cfg.head == "upsample_linear"):
            raise ValueError(
                f"{field}.head: {cfg.head}, but one frame of the student covers {self.rate} of the teacher's; expected "
                f"{'upsample_linear' if self.rate > 1 else 'a head without up-sampling'}"
            )
        self.heads = HEADS[cfg.head](own, theirs, count, self.rate)

    def _read_masking(self, field: str) -> None:
        """Reads the masking fields: the targets of the student's masked and other frames."""
        cfg = self.cfg
        self.masking = parse_masking(cfg, field)
        self.compared = {"masked_frames": cfg.masked_frames, "unmasked_frames": cfg.unmasked_frames}
        for name, value in self.compared.items():
            default = LayersConfig.__dataclass_fields__[name].default
            if self.masking is None and value != default:
                raise ValueError(f"{field}.{name}: {value} does nothing with {field}.mask_prob=0; leave it out")
            if value not in ("whole", "masked", None):
                raise ValueError(f"{field}.{name}: {value!r}; expected whole, masked or null")
        if not any(self.compared.values()):
            raise ValueError(
                f"{field}.masked_frames: null, like {field}.unmasked_frames, so nothing is distilled; set one"
            )
        if self.masking is None:
            return
        self.student_taps = [dataclasses.replace(tap, masking=self.masking) for tap in self.student_taps]
        # For each kind in use, one tap per pair.
        hidden = [dataclasses.replace(tap, masking=self.masking) for tap in self.teacher_taps]
        kinds = {"whole": self.teacher_taps, "masked": hidden}
        self.heard = [kind for kind in kinds if kind in self.compared.values()]
        self.teacher_taps = [tap for kind in self.heard for tap in kinds[kind]]

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; logs ``l1_sI_tJ``, ``mse_sI_tJ`` and ``cos_sI_tJ`` (the mean of cos or
        log sigmoid(cos)) of student layer I and teacher layer J."""
        predicted = self.heads(student)
        if self.rate > 1:
            # Leftover last frames of the teacher have no counterpart; the mask is for the student's frames.
            teacher = [t[:, : t.size(1) // self.rate * self.rate] for t in teacher]
            padding_mask = None if padding_mask is None else padding_mask.repeat_interleave(self.rate, 1)
        masked, share = masked_frames(sample, self.masking), None
        if masked is None:
            teacher = teacher[: len(self.pairs)]  # all ran on the whole utterance
        else:
            teacher, padding_mask, share = self._compared(teacher, padding_mask, masked[:, : predicted[0].size(1)])
        if padding_mask is not None:
            frames = without_padding([*predicted, *teacher], padding_mask)
            predicted, teacher = frames[: len(predicted)], frames[len(predicted) :]
        cfg = self.cfg
        cos_weight = cfg.cos_weight
        if cfg.cos_reduction == "sum":
            cos_weight *= predicted[0][..., 0].numel() / len(student[0])  # frames of an utterance, in the mean
        distance = (None, cfg.l1_weight, cos_weight, cfg.cos_type, cfg.mse_weight)
        parts = [distillation_loss(p, t, *distance) for p, t in zip(predicted, teacher)]
        loss = torch.stack([w * part.total for w, part in zip(self.weights, parts)]).sum()
        loss = loss if share is None else loss * share.to(loss.dtype)
        log = {}
        for (s, t), part in zip(self.pairs, parts):
            values = {"l1": part.l1, "mse": part.mse, "cos": -part.cos}
            log.update({f"{n}_s{s}_t{t}": v for n, v in values.items() if getattr(cfg, f"{n}_weight")})
        return loss, log

    def _compared(
        self, teacher: Sequence[Tensor], padding_mask: Optional[Tensor], masked: Tensor
    ) -> Tuple[List[Tensor], Optional[Tensor], Optional[Tensor]]:
        """The target of each frame.

        Args:
            teacher: states (B, T, D_T) for each kind in use and each pair.
            padding_mask: (B, T) bool, True = padding, or None.
            masked: (B, T) bool, True = masked.

        Returns:
            target states for each pair; the padding mask, which also marks frames without a target; and the share of
            frames that count, to multiply the loss by (None: all count).
        """
        count = len(self.pairs)
        states = {kind: list(teacher[k * count : (k + 1) * count]) for k, kind in enumerate(self.heard)}
        hidden, other = self.compared["masked_frames"], self.compared["unmasked_frames"]
        if hidden is not None and other is not None:
            if hidden == other:
                return states[hidden], padding_mask, None
            choice = masked.unsqueeze(-1)
            return [torch.where(choice, *pair) for pair in zip(states[hidden], states[other])], padding_mask, None
        counted = torch.ones_like(masked) if padding_mask is None else ~padding_mask
        kept = counted & (~masked if hidden is None else masked)
        share = kept.sum().double() / counted.sum()
        kept = torch.where(share > 0, kept, counted)  # if none has a target, the loss is 0
        return states[self.heard[0]], ~kept, share

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        names = ("teacher_layers", "student_layers", "head", "normalize_states")
        return {n: list(v) if is_sequence(v) else v for n, v in cfg.items() if n in names and v is not None}


Pairs = List[Tuple[int, int]]


def pair_layers(cfg: Any, student: EncoderConfig, teacher: EncoderConfig, field: str, first: int = 1) -> Pairs:
    """Pairs the student's layers with the teacher's.

    Args:
        cfg: with ``teacher_layers`` and ``student_layers``, see :class:`PairsConfig`. Both become lists.
        student, teacher: shapes.
        field: config path of ``cfg``, for messages.
        first: first layer of the student where both fields are null.

    Returns:
        (student layer, teacher layer), at least one.

    Raises:
        ValueError: a field is not a list of the encoder's layers, the lists differ in length, or a pair appears twice.
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
    """Taps of student and teacher, one for each pair; fills in ``cfg.normalize_states``."""
    choose_normalization(cfg, [teacher])
    own, theirs = ([Tap((i,), normalize=cfg.normalize_states) for i in layers] for layers in zip(*pairs))
    return own, theirs


def _layer_weights(value: Any, count: int, field: str) -> List[float]:
    """Weights of pairs of layers, see :class:`LayersConfig`.

    Raises:
        ValueError: they are not usable; names the field.
    """
    if isinstance(value, (int, float)):
        value = [value] * count
    elif isinstance(value, Mapping) or OmegaConf.is_dict(value):
        if set(value) != {"last", "others"}:
            raise ValueError(f"{field}: {value}; expected both last and others, as in {{last: 1.0, others: 0.1}}")
        value = [*[value["others"]] * (count - 1), value["last"]]
    return parse_weights(value, count, field, "pair of layers")


def _in_proportion(layers: Sequence[int], depth: int, other: int) -> List[int]:
    return [layer for (layer,) in map_groups(tuple((layer,) for layer in layers), [depth], other)]


def _layers(value: Any, depth: int, field: str, or_else: str = "") -> List[int]:
    if not is_sequence(value) or not value or any(type(i) is not int or not 0 <= i <= depth for i in value):
        example = f"layers from 0 to {depth}, such as [1, {depth}]"
        raise ValueError(f"{field}: {value}; expected {or_else}a list of {example}")
    return list(value)
