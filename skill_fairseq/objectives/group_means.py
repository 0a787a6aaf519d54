"""SKILL's objective: mean states of layer groups (arXiv:2402.16830). With singleton groups it is DPHuBERT's."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.groups import (
    StudentGroups,
    by_teacher,
    is_sequence,
    layer_name,
    layer_of,
    map_groups,
    parse_groups,
    parse_sharing,
    read_groups,
)
from skill_fairseq.objectives.loss import LossParts, check_distance, distillation_loss, parse_weights, without_padding
from skill_fairseq.objectives.objective import Objective, choose_normalization, register_objective

logger = logging.getLogger(__name__)


@dataclass
class GroupMeansConfig:
    """Groups, distance and projections."""

    groups: Optional[Any] = field(
        default=None,
        metadata={
            "help": "groups of teacher layers, such as [[0],[1,2,3],[4,5]]; layer 0 precedes the Transformer; 1/4 is "
            "layer 4 of the second of several teachers"
        },
    )
    groups_file: Optional[str] = field(
        default=None, metadata={"help": "YAML or JSON file with the key 'groups', as skill-cluster writes it"}
    )
    student_groups: Optional[Any] = field(
        default=None,
        metadata={
            "help": "the student's layers for each group, if its depth differs; null: those at the same relative depth"
        },
    )
    group_weights: Optional[Any] = field(
        default=None, metadata={"help": "weight of each group's loss; null: 1 / number of groups"}
    )
    normalize_states: Optional[bool] = field(
        default=None,
        metadata={
            "help": "layer-normalise every state before averaging a group; null: only for teachers with pre-LayerNorm "
            "layers, whose states grow large and outweigh the size constraint"
        },
    )
    l1_weight: float = field(default=1.0, metadata={"help": "weight of the L1 term"})
    cos_weight: float = field(default=1.0, metadata={"help": "weight of the cosine term"})
    cos_type: str = field(default="raw", metadata={"help": "raw: -mean cos; log_sig: -mean log sigmoid(cos)"})
    projection: str = field(
        default="linear", metadata={"help": "linear or identity: map from the student's group mean to the teacher's"}
    )
    projection_sharing: Any = field(
        default="all",
        metadata={
            "help": "none, all, or the projection's index for each group, such as DPHuBERT's [0,1,1,1]; teachers never "
            "share projections"
        },
    )


@register_objective("group_means", GroupMeansConfig)
class GroupMeans(Objective):
    """Loss = sum over groups g of w_g [a mean|t_g - W_g s_g| + b C_g], where t_g and s_g are the group's mean states.

    A student of another depth averages ``student_groups``, or the layers of :func:`map_groups`. If a group has layers
    of several teachers (whose widths may differ), each teacher has its own mean and projection, and the group's loss is
    the mean over teachers (our choice); the student has one mean.

    Args:
        cfg: a :class:`GroupMeansConfig`; groups read from a file and ``normalize_states`` are filled in.
        student, teachers, field: see :class:`Objective`.

    Raises:
        ValueError: groups, weights or projections are not usable; names the field.
    """

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        self.cfg = cfg
        check_distance(cfg, field)
        depths = [teacher.encoder_layers for teacher in teachers]
        found = read_groups(cfg.groups, cfg.groups_file, field)
        self.groups = parse_groups(found, depths, f"{field}.groups")
        cfg.groups, cfg.groups_file = [list(group) for group in self.groups], None
        self.student_groups = self._student_groups(cfg, depths, student.encoder_layers, field)
        if self.student_groups != self.groups:
            logger.info(f"student has {student.encoder_layers} layers: groups {self.groups} -> {self.student_groups}")
        choose_normalization(cfg, teachers)
        self.student_taps = [Tap(group, normalize=cfg.normalize_states) for group in self.student_groups]
        parts = [(g, k, layers) for g, group in enumerate(self.groups) for k, layers in by_teacher(group).items()]
        self.teacher_taps = [Tap(layers, normalize=cfg.normalize_states, teacher=k) for _, k, layers in parts]
        self.weights = parse_weights(cfg.group_weights, len(self.groups), f"{field}.group_weights", "group")
        for index, group in enumerate(self.groups):
            logger.info(f"group {index}: teacher layers {list(group)}, weight {self.weights[index]:.3f}")
        self.sharing = parse_sharing(cfg.projection_sharing, len(self.groups), f"{field}.projection_sharing")
        own = sorted({(k, self.sharing[g]) for g, k, _ in parts})  # (teacher, projection)
        self.projections = nn.ModuleList(
            projection(cfg.projection, student.encoder_embed_dim, teachers[k].encoder_embed_dim, f"{field}.projection")
            for k, _ in own
        )
        self.parts = [(g, own.index((k, self.sharing[g]))) for g, k, _ in parts]  # group and projection of each target

    def _student_groups(self, cfg: Any, depths: Sequence[int], layers: int, field: str) -> StudentGroups:
        if cfg.student_groups is None:
            return map_groups(self.groups, depths, layers)
        name, found = f"{field}.student_groups", cfg.student_groups
        if not is_sequence(found) or len(found) != len(self.groups):
            raise ValueError(f"{name} is {found}, but {field}.groups has {len(self.groups)}; give layers for each")
        # Groups may share a layer of the student, so each is checked separately.
        return tuple(parse_groups([group], layers, name)[0] for group in found)  # type: ignore[misc]

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; logs ``l1_gN`` and ``cos_gN``, the L1 distance and mean cosine of each group."""
        means = [self.projections[index](student[g]) for g, index in self.parts]
        if padding_mask is not None:
            frames = without_padding([*means, *teacher], padding_mask)
            means, teacher = frames[: len(means)], frames[len(means) :]
        weights = self.cfg.l1_weight, self.cfg.cos_weight
        parts: list[list[LossParts]] = [[] for _ in self.groups]  # for each group, one per teacher
        for (g, _), s, t in zip(self.parts, means, teacher):
            parts[g].append(distillation_loss(s, t, None, *weights, self.cfg.cos_type))
        loss = torch.stack([w / len(group) * p.total for w, group in zip(self.weights, parts) for p in group]).sum()
        l1 = {f"l1_g{i}": _mean([p.l1 for p in group]) for i, group in enumerate(parts)}
        return loss, {**l1, **{f"cos_g{i}": -_mean([p.cos for p in group]) for i, group in enumerate(parts)}}

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        names = ("groups", "student_groups", "projection_sharing", "normalize_states")
        found = {name: cfg[name] for name in names if cfg.get(name) is not None}
        if "groups" in found:
            pairs = [sorted(layer_of(name) for name in group) for group in found["groups"]]
            found["groups"] = [[layer_name(*pair) for pair in group] for group in pairs]
            if "projection_sharing" in found:
                found["projection_sharing"] = list(parse_sharing(found["projection_sharing"], len(found["groups"])))
        return found


def projection(kind: str, student: int, teacher: int, field: str = "criterion.projection") -> nn.Module:
    """A map from the student's width to the teacher's, (..., D_S) to (..., D_T).

    A linear map starts as the identity with zero bias, so that training starts from the student's own representation.
    Where the widths differ, the first ``min(D_S, D_T)`` features pass through and the other outputs start at zero.

    Raises:
        ValueError: ``kind`` is neither "linear" nor "identity", or it is "identity" and the widths differ.
    """
    if kind not in ("linear", "identity"):
        raise ValueError(f"{field}: {kind!r}; expected 'linear' or 'identity'")
    if kind == "identity":
        if student != teacher:
            raise ValueError(
                f"{field}=identity needs equal dimensions, but the student has {student} and the teacher {teacher}; "
                f"set {field}=linear"
            )
        return nn.Identity()
    linear = nn.Linear(student, teacher)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()
