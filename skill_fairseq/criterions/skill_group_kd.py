"""Group distillation with a size constraint, the loss of both stages."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import yaml
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.checkpoints.safetensors_file import looks_like_safetensors
from skill_fairseq.distillation.groups import GroupProjections, Groups, map_groups, parse_groups
from skill_fairseq.distillation.loss import LossParts, distillation_loss, without_padding
from skill_fairseq.distillation.teacher import averaged_states
from skill_fairseq.modules.size import sparsity
from skill_fairseq.pruning.expected import full_parameters
from skill_fairseq.pruning.lagrangian import SizeConstraint
from skill_fairseq.pruning.selection import check_reachable

logger = logging.getLogger(__name__)


@dataclass
class SkillGroupKDConfig(FairseqDataclass):
    """Groups, loss and size constraint."""

    groups: Optional[Any] = field(
        default=None,
        metadata={"help": "groups of teacher layers, e.g. [[0],[1,2,3],[4,5]]; layer 0 precedes the transformer"},
    )
    groups_file: Optional[str] = field(
        default=None, metadata={"help": "YAML or JSON with the key 'groups', as skill-cluster writes it"}
    )
    group_weights: Optional[Any] = field(
        default=None, metadata={"help": "weight of each group's loss; null: 1 / number of groups"}
    )
    normalize_states: bool = field(
        default=False, metadata={"help": "layer-normalise every state before a group is averaged"}
    )
    l1_weight: float = field(default=1.0, metadata={"help": "weight of the L1 term"})
    cos_weight: float = field(default=1.0, metadata={"help": "weight of the cosine term"})
    cos_type: ChoiceEnum(["raw", "log_sig"]) = field(  # type: ignore[valid-type]
        default="raw", metadata={"help": "raw: -mean cos; log_sig: -mean log sigmoid(cos)"}
    )
    projection: ChoiceEnum(["linear", "identity"]) = field(  # type: ignore[valid-type]
        default="linear", metadata={"help": "map from the student's group mean to the teacher's"}
    )
    projection_sharing: Any = field(
        default="all",
        metadata={"help": "none, all, or the projection's index for each group; DPHuBERT is [0,1,1,1]"},
    )
    init_from: Optional[str] = field(
        default=None, metadata={"help": "checkpoint whose projections to start from, for stage 2"}
    )
    target_sparsity: Optional[float] = field(
        default=None, metadata={"help": "fraction of the parameters to prune, in [0, 1); null: no size constraint"}
    )
    sparsity_warmup: int = field(default=5000, metadata={"help": "updates over which the target rises from 0"})


MAX_GROUPS_FILE = 1_000_000


def read_groups(cfg: SkillGroupKDConfig) -> Any:
    """The raw value of the groups, from the config or from the file it names.

    Raises:
        ValueError: neither or both are given, or the file has no groups.
        FileNotFoundError: the file is missing.
    """
    if (cfg.groups is None) == (cfg.groups_file is None):
        raise ValueError(
            f"criterion.groups: {cfg.groups}, criterion.groups_file: {cfg.groups_file}; give one of them, for example "
            "the groups that skill-cluster prints"
        )
    if cfg.groups_file is None:
        return cfg.groups
    path = Path(cfg.groups_file)
    if not path.is_file():
        raise FileNotFoundError(f"criterion.groups_file: {path} does not exist; write it with skill-cluster")
    if path.stat().st_size > MAX_GROUPS_FILE:
        raise ValueError(
            f"criterion.groups_file: {path} has {path.stat().st_size:,} bytes; expected at most {MAX_GROUPS_FILE:,}: "
            "name the file of skill-cluster"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # as dates, keys and nesting raise them
        raise ValueError(f"criterion.groups_file: {path} is no YAML ({error}); write it with skill-cluster") from error
    found = content.get("groups") if isinstance(content, dict) else None
    if found is None and isinstance(content, dict) and isinstance(content.get("criterion"), dict):
        found = content["criterion"].get("groups")
    if found is None:
        raise ValueError(f"criterion.groups_file: {path} has no key 'groups'; write it with skill-cluster")
    return found


@register_criterion("skill_group_kd", dataclass=SkillGroupKDConfig)
class SkillGroupKDCriterion(FairseqCriterion):
    """loss = sum of w_g [a L1_g + b C_g] (+ size constraint while training a gated student).

    Args:
        cfg: criterion config.
        task: the distillation task; its model has been built.

    Raises:
        ValueError: groups, weights, projections or target are not usable; names the field.
    """

    def __init__(self, cfg: SkillGroupKDConfig, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        student, teacher = task.student_config, task.teacher.config
        self.groups: Groups = parse_groups(read_groups(cfg), teacher.encoder_layers)
        self.student_groups = map_groups(self.groups, teacher.encoder_layers, student.encoder_layers)
        if self.student_groups != self.groups:
            logger.info(f"student has {student.encoder_layers} layers: groups {self.groups} -> {self.student_groups}")
        self.weights = _weights(cfg.group_weights, len(self.groups))
        self.projections = GroupProjections(
            self.groups,
            student.encoder_embed_dim,
            teacher.encoder_embed_dim,
            str(getattr(cfg.projection, "name", cfg.projection)),
            cfg.projection_sharing,
        )
        if cfg.init_from:
            self._init_projections(cfg.init_from)
        self.constraint: Optional[SizeConstraint] = None
        if cfg.target_sparsity is not None:
            if not student.pruning_units:
                raise ValueError(
                    f"criterion.target_sparsity: {cfg.target_sparsity}, but the student has no gates; set "
                    "model.pruning_units, or leave the target out for stage 2"
                )
            check_reachable(student, cfg.target_sparsity, "criterion.target_sparsity")
            self.constraint = SizeConstraint(cfg.target_sparsity, cfg.sparsity_warmup)
        self.full_parameters = full_parameters(student)
        for index, group in enumerate(self.groups):
            logger.info(f"group {index}: teacher layers {list(group)}, weight {self.weights[index]:.3f}")

    @classmethod
    def build_criterion(cls, cfg: SkillGroupKDConfig, task: Any) -> "SkillGroupKDCriterion":
        """Called by fairseq."""
        return cls(cfg, task)

    def _init_projections(self, path: str) -> None:
        """Takes over another run's projections; those of a run without the same ones stay as they are."""
        state = _saved_criterion(Path(path))
        found = {k[len("projections.") :]: v for k, v in state.items() if k.startswith("projections.")}
        own = self.projections.state_dict()
        if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
            self.projections.load_state_dict(found)
        else:
            logger.info(f"criterion.init_from: {path} has no projections for these groups; starting from the identity")

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, int, Dict]:
        """Loss of one batch.

        Args:
            model: the student.
            sample: ``net_input`` with ``source`` (B, N) and perhaps ``padding_mask`` (B, N); perhaps ``source_bits``,
                the source before it was rounded, see :meth:`SpeechDataset.collater`.

        Returns:
            scalar loss, sample size 1 (the loss is a mean already), values to log.
        """
        net_input = dict(sample["net_input"])
        if "source_bits" in sample:
            net_input["source"] = sample["source_bits"].view(torch.float32)
        # The gates before all else: the host waits for them, and the device shall have nothing left to do by then.
        draw = model.draw_gates()
        # Then the teacher: its memory is free again before the student's activations pile up.
        targets, _ = self.task.teacher.group_means(
            net_input["source"], net_input.get("padding_mask"), self.groups, self.cfg.normalize_states
        )
        out = model(**net_input, draw=draw)
        means = averaged_states(out["hidden_states"], self.student_groups, self.cfg.normalize_states)
        means = self.projections(means)
        if out["padding_mask"] is not None:
            frames = without_padding([*means, *targets], out["padding_mask"])
            means, targets = frames[: len(means)], frames[len(means) :]
        parts = self._group_losses(means, targets)
        distillation = torch.stack([w * p.total for w, p in zip(self.weights, parts)]).sum()
        loss = distillation
        values = {
            "distillation_loss": distillation,
            **{f"l1_g{i}": p.l1 for i, p in enumerate(parts)},
            **{f"cos_g{i}": -p.cos for i, p in enumerate(parts)},
        }
        if self.constraint is not None:
            expected = sparsity(out["expected_parameters"], self.full_parameters)
            update = self.task.num_updates
            if self.training:
                loss = loss + self.constraint(expected, update)
            values["expected_sparsity"] = expected
            values["lambda1"] = self.constraint.lambda1
            values["lambda2"] = self.constraint.lambda2
        source = net_input["source"]
        padding = net_input.get("padding_mask")
        samples = source.numel() - (0 if padding is None else padding.sum())
        values["loss"] = loss
        # They stay on the device: to fetch a number here would keep the backward pass waiting. Copies, as float64.
        log: Dict[str, Any] = dict(
            zip(values, torch.stack([v.detach().float() for v in values.values()]).double().unbind())
        )
        if self.constraint is not None:
            log["target_sparsity"] = self.constraint.target_at(update)
        log.update(
            sample_size=1,
            nsentences=source.size(0),
            ntokens=samples,
            audio_seconds=samples / self.task.cfg.sample_rate,
        )
        return loss, 1, log

    def _group_losses(self, student: List[Tensor], teacher: List[Tensor]) -> List[LossParts]:
        cos_type = str(getattr(self.cfg.cos_type, "name", self.cfg.cos_type))
        return [
            distillation_loss(s, t, None, self.cfg.l1_weight, self.cfg.cos_weight, cos_type=cos_type)
            for s, t in zip(student, teacher)
        ]

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Averages over batches; audio per second of training."""
        count = sum(log.get("sample_size", 0) for log in logging_outputs)
        if not count:
            return
        counted = {"sample_size", "nsentences", "ntokens", "audio_seconds"}
        for name in logging_outputs[0]:
            if name not in counted:
                mean = sum(log.get(name, 0.0) for log in logging_outputs) / count
                metrics.log_scalar(name, mean, count, round=4)
        metrics.log_speed("audio_s_per_s", sum(log.get("audio_seconds", 0.0) for log in logging_outputs), round=1)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Yes: every value is a number or a scalar tensor."""
        return True


def _saved_criterion(path: Path) -> Dict[str, Tensor]:
    """State of the criterion in a fairseq checkpoint; empty for exported files and folders, which have none."""
    if not path.exists():
        raise FileNotFoundError(f"criterion.init_from: {path} does not exist; give stage 1's checkpoint, or null")
    if path.is_dir():
        return {}
    with open(path, "rb") as file:
        if looks_like_safetensors(file.read(64)):
            return {}
    return load_torch_file(path).get("criterion") or {}


def _weights(value: Any, num_groups: int) -> List[float]:
    if value is None:
        return [1 / num_groups] * num_groups
    value = plain(value)
    weights = [w for w in value if isinstance(w, (int, float))] if isinstance(value, list) else []
    if len(weights) != num_groups or not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise ValueError(
            f"criterion.group_weights: {value}; expected {num_groups} numbers >= 0, not all 0, one for each group"
        )
    return weights
