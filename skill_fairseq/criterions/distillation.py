"""The loss of both stages: a sum of objectives with a size constraint."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.criterions.logged import OF, reduce_metrics
from skill_fairseq.criterions.size_constraint import SizeConstraintConfig, build_constraint
from skill_fairseq.criterions.terms import Term, init_objectives, learns_from_labels, read_objective
from skill_fairseq.files import named
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.gate_bank import Draw
from skill_fairseq.modules.taps import Tap, deepest
from skill_fairseq.objectives.objective import OBJECTIVES
from skill_fairseq.pruning.elastic import ElasticConstraint

logger = logging.getLogger(__name__)


@dataclass
class DistillationConfig(SizeConstraintConfig):
    """Named objectives, and the size constraint."""

    objectives: Optional[Any] = field(
        default=None,
        metadata={
            "help": "NAME: {_name: a registered objective, weight: 1.0, and its own fields}; NAME is your choice and "
            "prefixes logged values and parameters; adapters: false runs the student without its adapters; "
            "weight_epochs: N lowers the weight linearly to 0 in epoch N"
        },
    )


class _Heard(NamedTuple):
    """Result of one batch for a student of one size."""

    loss: Tensor  # scalar
    values: Dict[str, Tensor]  # scalars to log
    ratios: Dict[str, Tensor]  # (2,): sum and count, logged as their quotient
    padding_mask: Optional[Tensor]  # (B, T)
    expected_widths: Any


@register_criterion("distillation", dataclass=DistillationConfig)
class DistillationCriterion(FairseqCriterion):
    """Loss = weighted sum of objectives (+ size constraint while training a gated student).

    Args:
        cfg: criterion config; null fields that objectives choose are filled in.
        task: the distillation task, after it built the model.

    Raises:
        ValueError: an objective or the target is not usable; names the field.

    Attributes:
        terms: the objectives and their weights.
        student_taps, teacher_taps: all taps of the objectives, without duplicates.
        maskings: all maskings of the taps, without duplicates.
    """

    unsupervised = "criterion.objectives"

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        student = task.student_config
        teachers = [teacher.config for teacher in task.teachers] if self.needs_teacher() else []
        self.terms = self.build_terms(student, teachers)
        self.student_taps = list(dict.fromkeys(tap for term in self.terms for tap in term.objective.student_taps))
        self.teacher_taps = list(dict.fromkeys(tap for term in self.terms for tap in term.objective.teacher_taps))
        every = (tap.masking for tap in [*self.student_taps, *self.teacher_taps])
        self.maskings = [masking for masking in dict.fromkeys(every) if masking is not None]
        for term in self.terms:
            for k in {tap.teacher for tap in term.objective.teacher_taps if tap.masking is not None}:
                task.check_mask_embedding(k, term.field)
            for k, made in term.objective.made_with.items():
                task.check_made_with(k, made, term.field)
        for term in self.terms:
            rates = {teachers[tap.teacher].time_reduction for tap in term.objective.teacher_taps}
            if rates - {student.time_reduction} and not term.objective.any_rate:
                raise ValueError(
                    f"model.time_reduction: {student.time_reduction}, but the teacher has {max(rates)}, and "
                    f"{term.field} compares frame by frame; give both the same, or use the objective layers with head: "
                    "upsample_linear"
                )
        asked = [("student", student, tap) for tap in self.student_taps]
        asked += [("teacher", teachers[tap.teacher], tap) for tap in self.teacher_taps]
        for whose, shape, tap in asked:
            with named(f"{self.unsupervised}: what is asked of the {whose}"):
                tap.check(shape)
        unheard = set(range(1, len(teachers))) - {tap.teacher for tap in self.teacher_taps}
        if unheard:
            logger.warning(f"{self.unsupervised}: no objective uses the teachers {sorted(unheard)} of task.teacher")
        if deepest(self.student_taps) < student.encoder_layers:
            logger.warning(self._unsupervised(student.encoder_layers))
        if cfg.init_from:
            init_objectives(self.terms, cfg.init_from)
        self.constraint = build_constraint(cfg, student, getattr(task, "nested", False))
        self.student_config = student

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "DistillationCriterion":
        """Called by fairseq."""
        return cls(cfg, task)

    def needs_teacher(self) -> bool:
        """Whether any objective needs a teacher; those that learn only from labels do not."""
        given = plain(self.cfg.objectives)
        entries = list(given.values()) if isinstance(given, dict) else []
        kinds = [entry.get("_name") for entry in entries if isinstance(entry, dict)]
        return not kinds or not all(kind in OBJECTIVES and learns_from_labels(kind) for kind in kinds)

    def build_terms(self, student: EncoderConfig, teachers: Sequence[EncoderConfig]) -> List[Term]:
        """The objectives that ``cfg.objectives`` names.

        Raises:
            ValueError: there is none, or one is unknown or has unusable fields; names the field.
        """
        given = self.cfg.objectives
        if not OmegaConf.is_dict(given) or not given:
            raise ValueError(
                f"criterion.objectives: {plain(given)}; expected at least one, by a name of your choice, such as "
                "{skill: {_name: group_means, groups: [[0], [12]]}}"
            )
        self.objectives, terms = nn.ModuleDict(), []
        for name in given:
            field = f"criterion.objectives.{name}"
            if not str(name).isidentifier() or hasattr(self.objectives, name):
                raise ValueError(f"{field}: cannot be a name; use another one of letters, digits and _")
            kind, weight, common, cfg = read_objective(given[name], field)
            labels = {"targets": self.task.targets} if learns_from_labels(kind) else {}
            objective = OBJECTIVES[kind][0](cfg, student, teachers, field, **labels)
            self.objectives[name] = objective
            adapters = common.get("adapters", True)
            if not adapters and not student.adapter_dim:
                raise ValueError(f"{field}.adapters: false does nothing with model.adapter_dim=0; leave it out")
            if not adapters:
                objective.student_taps = [dataclasses.replace(tap, adapters=False) for tap in objective.student_taps]
            with open_dict(given):
                given[name] = {"_name": kind, "weight": weight, **plain(cfg), **common}
            epochs = common.get("weight_epochs", 0)
            terms.append(Term(objective, weight, cfg, f"objectives.{name}", field, f"{name}_", epochs))
        return terms

    def chosen(self) -> Dict[str, Any]:
        """The config fields that the objectives filled in, to save with the criterion's config."""
        return {"objectives": plain(self.cfg.objectives)}

    def _unsupervised(self, layers: int) -> str:
        """Warns about the student's layers above the deepest one that an objective uses; layers count from 1."""
        last = deepest(self.student_taps)
        above = f"layer {layers}" if last + 1 == layers else f"layers {last + 1} to {layers}"
        fate = "they do not change"
        if any(self.cfg[name] is not None for name in ("target_sparsity", "target", "elastic")):
            fate = "only the size constraint moves their gates, and it closes them first"
        return (
            f"{self.unsupervised}: nothing supervises the student's {above}: they are not computed and get no loss, "
            f"{fate}. Use them in an objective, or fine-tune and probe the student up to layer {last}"
        )

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, float, Dict]:
        """Computes the loss of one batch.

        Args:
            model: the student.
            sample: ``net_input`` with ``source`` (B, N) and optionally ``padding_mask`` (B, N); optionally
                ``source_bits``, the source before rounding, and ``masked``, see :meth:`SpeechDataset.collater`; labels
                for objectives that need them.

        Returns:
            scalar loss, its weight in the update (see :meth:`SkillDistillationTask.batch_weight`; fairseq divides the
            summed gradients by the summed weights), sums over frames to log.
        """
        net_input = dict(sample["net_input"])
        if "source_bits" in sample:
            net_input["source"] = sample["source_bits"].view(torch.float32)
        source, padding = net_input["source"], net_input.get("padding_mask")
        # The dataset masks nothing in validation.
        masked = sample.get("masked") or {}
        if self.training and len(masked) < len(self.maskings):
            raise ValueError(f"sample: 'masked' holds {len(masked)} masks; expected one for each of {self.maskings}")
        # Gates first: the host waits for them, so the device should have no work queued.
        draws = self._draws(model)
        # Then the teachers: their memory is freed before the student's activations fill it.
        teacher: Dict[Tap, Tensor] = {}
        for index in sorted({tap.teacher for tap in self.teacher_taps}):
            taps = [tap for tap in self.teacher_taps if tap.teacher == index]
            teacher.update(zip(taps, self.task.teachers[index].tap(source, padding, taps, masked)))
        heard = [self._hear(model, net_input, sample, draw, teacher, masked) for _, draw in draws]
        _, values, ratios, mask, widths = heard[0]
        loss = heard[0].loss
        if len(heard) > 1:  # the mean keeps learning rate and clipping comparable to one size
            loss = torch.stack([each.loss for each in heard]).mean()
            values = {name: torch.stack([each.values[name] for each in heard]).mean() for name in values}
            ratios = {name: torch.stack([each.ratios[name] for each in heard]).sum(0) for name in ratios}
        values = {"distillation_loss": loss, **values}
        values.update({f"distillation_loss_at_{size:g}": each.loss for (size, _), each in zip(draws, heard) if size})
        if self.constraint is not None:
            targets, update = self.constraint.targets, self.task.num_updates
            expected = [each.cost.sparsity(self.student_config, widths) for each in targets]
            if self.training:
                loss = loss + self.constraint(expected, update)
            ends = [f"_{each.cost.name}" if len(targets) > 1 else "" for each in targets]
            values.update({f"expected_sparsity{end}": sparsity for end, sparsity in zip(ends, expected)})
            values.update(self.constraint.named_parameters())
        # A tensor on every rank, padded or not: fairseq sums tensors and numbers over ranks separately.
        samples = source.new_full((), source.numel(), dtype=torch.float64)
        if padding is not None:
            samples = samples - padding.sum()
        values["loss"] = loss
        if mask is None:
            count = source.size(0) * self.task.student_config.num_output_frames(source.size(1))
        else:
            count = int((~mask).sum())
        # They stay on the device: fetching a number here would delay the backward pass. Copies, as float64.
        log: Dict[str, Any] = dict(
            zip(values, (torch.stack([v.detach().float() for v in values.values()]).double() * count).unbind())
        )
        for name, pair in ratios.items():
            log[name], log[f"{name}{OF}"] = pair.detach().double().unbind()
        if self.constraint is not None:
            for end, sparsity in zip(ends, self.constraint.targets_at(update)):
                log[f"target_sparsity{end}"] = sparsity * count
        log.update(
            frames=count,
            nsentences=source.size(0),
            ntokens=samples,
            audio_seconds=samples / self.task.cfg.sample_rate,
        )
        # The size term is the same in every batch of an update and must count once.
        weight = self.task.batch_weight(count) if self.training else 1.0
        return loss * weight, weight, log

    def _draws(self, model: Any) -> List[Tuple[Optional[float], Optional[Draw]]]:
        """The gates of each student of this batch (one, or several in an elastic run, largest first), and the sizes of
        those that are logged separately."""
        constraint, update = self.constraint, self.task.num_updates
        if not isinstance(constraint, ElasticConstraint):
            return [(None, model.draw_gates())]
        sizes, encoder = constraint.sizes, model.speech_encoder
        asked = constraint.sizes_at(update, model.cfg.seed) if self.training else sizes.valid
        draws = [model.draw_gates(constraint.log_alpha(encoder, size, update)) for size in asked]
        logged = (sizes.largest, sizes.smallest, *sizes.valid)
        return [(size if size in logged else None, draw) for size, draw in zip(asked, draws)]

    def _hear(
        self,
        model: Any,
        net_input: Dict[str, Any],
        sample: Dict[str, Any],
        draw: Optional[Draw],
        teacher: Dict[Tap, Tensor],
        masked: Dict[Any, Tensor],
    ) -> _Heard:
        """The loss and logged values of the student with these gates."""
        out = model(**net_input, draw=draw, taps=self.student_taps, masked=masked)
        student: Dict[Tap, Tensor] = dict(zip(self.student_taps, out["taps"]))
        losses: List[Tensor] = []
        values: Dict[str, Tensor] = {}
        ratios: Dict[str, Tensor] = {}
        for term in self.terms:
            asked = term.objective.student_taps, term.objective.teacher_taps
            found = ([side[tap] for tap in taps] for side, taps in zip((student, teacher), asked))
            loss, terms = term.objective(*found, out["padding_mask"], sample)
            # Validation compares epochs, so its weights do not depend on them.
            losses.append((term.weight_in(self.task.epoch) if self.training else term.weight) * loss)
            for name, value in terms.items():
                (ratios if value.dim() else values)[f"{term.prefix}{name}"] = value
            if term.prefix:
                values[f"{term.prefix}loss"] = loss
        return _Heard(torch.stack(losses).sum(), values, ratios, out["padding_mask"], out["expected_widths"])

    reduce_metrics = staticmethod(reduce_metrics)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: every value is a number or a scalar tensor."""
        return True
