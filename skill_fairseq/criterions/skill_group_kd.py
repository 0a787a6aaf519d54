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
from omegaconf import II
from torch import Tensor

from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.checkpoints.safetensors_file import looks_like_safetensors
from skill_fairseq.distillation.groups import GroupProjections, Groups, map_groups, parse_groups, parse_sharing
from skill_fairseq.distillation.loss import LossParts, distillation_loss, without_padding
from skill_fairseq.distillation.teacher import averaged_states
from skill_fairseq.files import named
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.pruning.costs import make_cost
from skill_fairseq.pruning.lagrangian import CostConstraint, updates_of
from skill_fairseq.pruning.selection import check_reachable
from skill_fairseq.reading import read_text

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
    normalize_states: Optional[bool] = field(
        default=None,
        metadata={
            "help": "layer-normalise every state before a group is averaged; null: where the teacher's layers begin "
            "with their LayerNorm, whose states grow large and outweigh the size constraint"
        },
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
        default=None, metadata={"help": "fraction of the cost to prune, in [0, 1); null: no constraint"}
    )
    cost: str = field(default="parameters", metadata={"help": "what target_sparsity is of: parameters or macs"})
    cost_seconds: Optional[float] = field(
        default=None, metadata={"help": "length of the utterance whose MACs count; null: 10"}
    )
    sparsity_warmup: float = field(
        default=5000, metadata={"help": "updates over which the target rises from 0, or a fraction of all, such as 0.1"}
    )
    max_update: int = field(
        default=II("optimization.max_update"), metadata={"help": "what a fraction in sparsity_warmup refers to"}
    )


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
    with named("criterion.groups_file"):
        text = read_text(path)
    try:
        content = yaml.safe_load(text)
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
        cfg.normalize_states = normalizes(cfg, teacher)
        _check_weights(cfg)
        self.groups: Groups = parse_groups(read_groups(cfg), teacher.encoder_layers)
        self.student_groups = map_groups(self.groups, teacher.encoder_layers, student.encoder_layers)
        self.deepest_layer = max(layer for group in self.student_groups for layer in group)
        if self.student_groups != self.groups:
            logger.info(f"student has {student.encoder_layers} layers: groups {self.groups} -> {self.student_groups}")
        self.weights = _weights(cfg.group_weights, len(self.groups))
        if self.deepest_layer < student.encoder_layers:
            logger.warning(_unsupervised(self.deepest_layer, student.encoder_layers, cfg.target_sparsity is not None))
        self.projections = GroupProjections(
            self.groups,
            student.encoder_embed_dim,
            teacher.encoder_embed_dim,
            str(getattr(cfg.projection, "name", cfg.projection)),
            cfg.projection_sharing,
        )
        if cfg.init_from:
            self._init_projections(cfg.init_from)
        self.constraint: Optional[CostConstraint] = None
        if cfg.target_sparsity is not None:
            if not student.pruning_units:
                raise ValueError(
                    f"criterion.target_sparsity: {cfg.target_sparsity}, but the student has no gates; set "
                    "model.pruning_units, or leave the target out for stage 2"
                )
            try:
                cost = make_cost(cfg.cost, cost_seconds=cfg.cost_seconds)
            except ValueError as error:
                raise ValueError(f"criterion.{error}") from error
            check_reachable(student, cfg.target_sparsity, "criterion.target_sparsity", cost)
            total = cfg.max_update if 0 < cfg.sparsity_warmup < 1 else 0
            warmup = updates_of(cfg.sparsity_warmup, total, "criterion.sparsity_warmup")
            self.constraint = CostConstraint(cfg.target_sparsity, warmup, cost)
        elif student.pruning_units:
            raise ValueError(
                f"criterion.target_sparsity: null, but the student has gates on {student.pruning_units}, which nothing "
                "would close; set it, for example to 0.75, or leave model.pruning_units empty"
            )
        self.student_config = student
        for index, group in enumerate(self.groups):
            logger.info(f"group {index}: teacher layers {list(group)}, weight {self.weights[index]:.3f}")

    @classmethod
    def build_criterion(cls, cfg: SkillGroupKDConfig, task: Any) -> "SkillGroupKDCriterion":
        """Called by fairseq."""
        return cls(cfg, task)

    def _init_projections(self, path: str) -> None:
        """Takes over the projections of a run with the same groups, sharing and ``normalize_states``.

        Raises:
            ValueError: the run had others; names the field and both values.
        """
        own = self.projections.state_dict()
        if not own:  # criterion.projection=identity
            return
        checkpoint = _saved_run(Path(path))
        state = checkpoint.get("criterion") or {}
        found = {k[len("projections.") :]: v for k, v in state.items() if k.startswith("projections.")}
        if not found:
            logger.warning(
                f"criterion.init_from: {path} holds no projections, they start as the identity; give stage 1's "
                "checkpoint, or null"
            )
            return
        before = (plain(checkpoint.get("cfg")) or {}).get("criterion") or {}
        mine = {
            "groups": [sorted(group) for group in self.groups],
            "projection_sharing": list(self.projections.sharing),
            "normalize_states": self.cfg.normalize_states,
        }
        theirs = {name: before[name] for name in mine if before.get(name) is not None}
        if "groups" in theirs:
            theirs["groups"] = [sorted(group) for group in theirs["groups"]]
            if "projection_sharing" in theirs:
                theirs["projection_sharing"] = list(parse_sharing(theirs["projection_sharing"], len(theirs["groups"])))
        shapes = [{k: list(v.shape) for k, v in side.items()} for side in (found, own)]
        compared = [(f"criterion.{name}", theirs[name], mine[name]) for name in theirs]
        for name, other, value in [*compared, ("shapes of projections", *shapes)]:
            if other != value:
                raise ValueError(
                    f"criterion.init_from: {path}: its projections were trained with {name} = {other}, here it is "
                    f"{value}; give both runs the same, or start from the identity with criterion.init_from=null"
                )
        self.projections.load_state_dict(found)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, float, Dict]:
        """Loss of one batch.

        Args:
            model: the student.
            sample: ``net_input`` with ``source`` (B, N) and perhaps ``padding_mask`` (B, N); perhaps ``source_bits``,
                the source before it was rounded, see :meth:`SpeechDataset.collater`.

        Returns:
            scalar loss, its weight in the update (see :meth:`SkillDistillationTask.batch_weight`; fairseq divides the
            summed gradients by the summed weights), sums over frames to log.
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
        out = model(**net_input, draw=draw, last_layer=self.deepest_layer)
        means = averaged_states(out["hidden_states"], self.student_groups, bool(self.cfg.normalize_states))
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
            expected = self.constraint.cost.sparsity(self.student_config, out["expected_widths"])
            update = self.task.num_updates
            if self.training:
                loss = loss + self.constraint(expected, update)
            values["expected_sparsity"] = expected
            values["lambda1"] = self.constraint.lambda1
            values["lambda2"] = self.constraint.lambda2
        source = net_input["source"]
        padding = net_input.get("padding_mask")
        # A tensor on every rank, padded or not: fairseq sums tensors and numbers over ranks apart.
        samples = source.new_full((), source.numel(), dtype=torch.float64)
        if padding is not None:
            samples = samples - padding.sum()
        values["loss"] = loss
        count = means[0][..., 0].numel()  # of frames
        # They stay on the device: to fetch a number here would keep the backward pass waiting. Copies, as float64.
        log: Dict[str, Any] = dict(
            zip(values, (torch.stack([v.detach().float() for v in values.values()]).double() * count).unbind())
        )
        if self.constraint is not None:
            log["target_sparsity"] = self.constraint.target_at(update) * count
        log.update(
            frames=count,
            nsentences=source.size(0),
            ntokens=samples,
            audio_seconds=samples / self.task.cfg.sample_rate,
        )
        # The size term is the same in every batch of an update, so that it counts once there.
        weight = self.task.batch_weight(count) if self.training else 1.0
        return loss * weight, weight, log

    def _group_losses(self, student: List[Tensor], teacher: List[Tensor]) -> List[LossParts]:
        cos_type = str(getattr(self.cfg.cos_type, "name", self.cfg.cos_type))
        return [
            distillation_loss(s, t, None, self.cfg.l1_weight, self.cfg.cos_weight, cos_type=cos_type)
            for s, t in zip(student, teacher)
        ]

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Means over all frames; audio per second of training."""
        frames = sum(log.get("frames", 0) for log in logging_outputs)
        if not frames:
            return
        counted = {"frames", "nsentences", "ntokens", "audio_seconds"}
        for name in logging_outputs[0]:
            if name not in counted:
                mean = sum(log.get(name, 0.0) for log in logging_outputs) / frames
                metrics.log_scalar(name, mean, frames, round=4)
        metrics.log_speed("audio_s_per_s", sum(log.get("audio_seconds", 0.0) for log in logging_outputs), round=1)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Yes: every value is a number or a scalar tensor."""
        return True


def _saved_run(path: Path) -> Dict[str, Any]:
    """A fairseq checkpoint; empty for exported files and folders, which have no criterion."""
    if not path.exists():
        raise FileNotFoundError(f"criterion.init_from: {path} does not exist; give stage 1's checkpoint, or null")
    if path.is_dir():
        return {}
    with open(path, "rb") as file:
        if looks_like_safetensors(file.read(64)):
            return {}
    return load_torch_file(path)


def _unsupervised(deepest: int, layers: int, pruned: bool) -> str:
    """What becomes of the student's layers above the deepest group, 1-based."""
    above = f"layer {layers}" if deepest + 1 == layers else f"layers {deepest + 1} to {layers}"
    fate = "only the size constraint moves their gates, and it closes them first" if pruned else "they stay as they are"
    return (
        f"criterion.groups: no group supervises the student's {above}: they are not computed, no loss reaches them, "
        f"{fate}. Add their layers to a group, or fine-tune and probe the student up to layer {deepest}"
    )


def normalizes(cfg: SkillGroupKDConfig, teacher: EncoderConfig) -> bool:
    """Whether states are normalised before they are averaged: as ``cfg`` says, or as suits the teacher.

    Where layers begin with their LayerNorm (pre-LayerNorm: HuBERT and WavLM Large), nothing bounds what they add up,
    and states of layers differ in size by orders of magnitude. The L1 term would outweigh the size constraint.
    """
    return teacher.layer_norm_first if cfg.normalize_states is None else bool(cfg.normalize_states)


def _check_weights(cfg: SkillGroupKDConfig) -> None:
    for name in ("l1_weight", "cos_weight"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"criterion.{name}: {getattr(cfg, name)}; expected a number of at least 0")
    if not cfg.l1_weight and not cfg.cos_weight:
        raise ValueError("criterion.l1_weight: 0, as criterion.cos_weight, so that nothing is distilled; raise one")


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
