"""The sum of objectives with a size constraint, the loss of both stages."""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.checkpoints.safetensors_file import looks_like_safetensors
from skill_fairseq.files import named
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap, deepest
from skill_fairseq.objectives.objective import OBJECTIVES, Objective
from skill_fairseq.pruning.costs import PARAMETERS, make_cost
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.lagrangian import CostConstraint, updates_of
from skill_fairseq.pruning.latency import read_table, table_text
from skill_fairseq.pruning.selection import check_reachable
from skill_fairseq.pruning.targets import SCHEDULES, Constraint, Target, read_targets

logger = logging.getLogger(__name__)

CONSTRAINTS: Dict[str, Type[Constraint]] = {"lagrangian": CostConstraint, "exact": ExactConstraint}
"""How gates are brought to their target, by name."""


@dataclass
class SizeConstraintConfig(FairseqDataclass):
    """What all distillation has: where its parameters start, and how small the student is to be."""

    init_from: Optional[str] = field(
        default=None, metadata={"help": "checkpoint whose projections and heads to start from, for stage 2"}
    )
    target: Optional[Any] = field(
        default=None,
        metadata={
            "help": "what is to be left of costs, {macs: 0.25} or {parameters: 0.25, macs: 0.2, seconds: 10}: all are "
            "met; in place of target_sparsity, which says what goes of one cost"
        },
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
    sparsity_schedule: ChoiceEnum(list(SCHEDULES)) = field(  # type: ignore[valid-type]
        default="linear", metadata={"help": "how the target rises; exponential: by equal factors of what is left"}
    )
    constraint: ChoiceEnum(list(CONSTRAINTS)) = field(  # type: ignore[valid-type]
        default="lagrangian",
        metadata={"help": "lagrangian: multipliers drive to the target; exact: a shift of all gates keeps them there"},
    )
    max_update: int = field(
        default=II("optimization.max_update"), metadata={"help": "what a fraction in sparsity_warmup refers to"}
    )


@dataclass
class DistillationConfig(SizeConstraintConfig):
    """Objectives by any names, and the size constraint."""

    objectives: Optional[Any] = field(
        default=None,
        metadata={
            "help": "NAME: {_name: what is registered, weight: 1.0, and its own fields}; NAME, of your choice, stands "
            "before what is logged and in the names of its parameters; adapters: false lets it see the student without "
            "its adapters"
        },
    )


OF = "/of"
"""After the name of a sum that is logged: the name of the count by which it is divided."""


class Term(NamedTuple):
    """One objective of the sum.

    Attributes:
        objective: the objective.
        weight: its factor.
        cfg: its config.
        path: its attribute of the criterion, with which checkpoints name its parameters.
        field: where its config stands, from the criterion's on.
        prefix: of the names of what it logs.
    """

    objective: Objective
    weight: float
    cfg: Any
    path: str
    field: str
    prefix: str


@register_criterion("distillation", dataclass=DistillationConfig)
class DistillationCriterion(FairseqCriterion):
    """loss = sum of weighted objectives (+ size constraint while training a gated student).

    Args:
        cfg: criterion config; what objectives choose themselves is written into it.
        task: the distillation task; its model has been built.

    Raises:
        ValueError: an objective or the target is not usable; names the field.

    Attributes:
        terms: the objectives and their weights.
        student_taps, teacher_taps: what all of them ask, each once.
        maskings: those among the taps, each once.
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
                    f"{term.field} compares frame by frame; give both the same, or the objective layers with head: "
                    "upsample_linear"
                )
        asked = [("student", student, tap) for tap in self.student_taps]
        asked += [("teacher", teachers[tap.teacher], tap) for tap in self.teacher_taps]
        for whose, shape, tap in asked:
            with named(f"{self.unsupervised}: what is asked of the {whose}"):
                tap.check(shape)
        unheard = set(range(1, len(teachers))) - {tap.teacher for tap in self.teacher_taps}
        if unheard:
            logger.warning(f"{self.unsupervised}: nothing is asked of the teachers {sorted(unheard)} of task.teacher")
        if deepest(self.student_taps) < student.encoder_layers:
            logger.warning(self._unsupervised(student.encoder_layers))
        if cfg.init_from:
            self._init_objectives(cfg.init_from)
        self.constraint = self.build_constraint(student)
        self.student_config = student

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "DistillationCriterion":
        """Called by fairseq."""
        return cls(cfg, task)

    def needs_teacher(self) -> bool:
        """Whether an objective does; those that learn from labels alone do not."""
        given = plain(self.cfg.objectives)
        entries = list(given.values()) if isinstance(given, dict) else []
        kinds = [entry.get("_name") for entry in entries if isinstance(entry, dict)]
        return not kinds or not all(kind in OBJECTIVES and _learns_from_labels(kind) for kind in kinds)

    def build_terms(self, student: EncoderConfig, teachers: Sequence[EncoderConfig]) -> List[Term]:
        """The objectives that ``cfg.objectives`` names.

        Raises:
            ValueError: there is none, or one is unknown or has unusable fields; names the field.
        """
        given = self.cfg.objectives
        if not OmegaConf.is_dict(given) or not given:
            raise ValueError(
                f"criterion.objectives: {plain(given)}; expected one at least, by a name of your choice, such as "
                "{skill: {_name: group_means, groups: [[0], [12]]}}"
            )
        self.objectives, terms = nn.ModuleDict(), []
        for name in given:
            field = f"criterion.objectives.{name}"
            if not str(name).isidentifier() or hasattr(self.objectives, name):
                raise ValueError(f"{field}: cannot be a name; take another one of letters, digits and _")
            kind, weight, adapters, cfg = _read_objective(given[name], field)
            labels = {"targets": self.task.targets} if _learns_from_labels(kind) else {}
            objective = OBJECTIVES[kind][0](cfg, student, teachers, field, **labels)
            self.objectives[name] = objective
            if not adapters and not student.adapter_dim:
                raise ValueError(f"{field}.adapters: false does nothing with model.adapter_dim=0; leave it out")
            if not adapters:
                objective.student_taps = [dataclasses.replace(tap, adapters=False) for tap in objective.student_taps]
            with open_dict(given):
                given[name] = {
                    "_name": kind,
                    "weight": weight,
                    **plain(cfg),
                    **({} if adapters else {"adapters": False}),
                }
            terms.append(Term(objective, weight, cfg, f"objectives.{name}", field, f"{name}_"))
        return terms

    def build_constraint(self, student: EncoderConfig) -> Optional[Constraint]:
        """The size constraint that the config asks for, None without a target.

        Raises:
            ValueError: there is no target for gates, or no gates for a target, or it is out of reach; names the field.
        """
        cfg = self.cfg
        name = "target_sparsity" if cfg.target is None else "target"
        field, asked = f"criterion.{name}", plain(cfg[name])
        if asked is None:
            if student.pruning_units:
                raise ValueError(
                    f"criterion.target_sparsity: null, but the student has gates on {student.pruning_units}, which "
                    "nothing would close; set it, for example to 0.75, or leave model.pruning_units empty"
                )
            return None
        if not student.pruning_units:
            raise ValueError(
                f"{field}: {asked}, but the student has no gates; set model.pruning_units, or leave the target out for "
                "stage 2"
            )
        if name == "target":
            for other, unset in (("target_sparsity", None), ("cost", PARAMETERS.name), ("cost_seconds", None)):
                if cfg[other] != unset:
                    raise ValueError(
                        f"criterion.{other}: {cfg[other]} stands beside criterion.target={asked}, which says it in "
                        f"another way; set criterion.{other}={'null' if unset is None else unset}"
                    )
            if isinstance(asked, dict) and isinstance(asked.get("table"), str):  # the checkpoint is to hold it
                with named(f"{field}.table: {asked['table']}"):
                    text = Path(asked["table"]).read_text(encoding="utf-8")
                    asked["table"] = json.loads(table_text(read_table(text)))
                with open_dict(cfg):
                    cfg.target = asked
            targets = read_targets(asked, field)
        else:
            try:
                targets = (Target(make_cost(cfg.cost, cost_seconds=cfg.cost_seconds), cfg.target_sparsity),)
            except ValueError as error:
                raise ValueError(f"criterion.{error}") from error
        for target in targets:
            check_reachable(student, target.sparsity, field, target.cost)
        total = cfg.max_update if 0 < cfg.sparsity_warmup < 1 else 0
        warmup = updates_of(cfg.sparsity_warmup, total, "criterion.sparsity_warmup")
        return CONSTRAINTS[str(cfg.constraint)](targets, warmup, schedule=str(cfg.sparsity_schedule))

    def chosen(self) -> Dict[str, Any]:
        """What the objectives chose themselves, fields of the criterion's config, to be saved with it."""
        return {"objectives": plain(self.cfg.objectives)}

    def _unsupervised(self, layers: int) -> str:
        """What becomes of the student's layers above the deepest that is asked for, 1-based."""
        last = deepest(self.student_taps)
        above = f"layer {layers}" if last + 1 == layers else f"layers {last + 1} to {layers}"
        fate = "they stay as they are"
        if self.cfg.target_sparsity is not None or self.cfg.target is not None:
            fate = "only the size constraint moves their gates, and it closes them first"
        return (
            f"{self.unsupervised}: nothing supervises the student's {above}: they are not computed, no loss reaches "
            f"them, {fate}. Ask for them too, or fine-tune and probe the student up to layer {last}"
        )

    def _init_objectives(self, path: str) -> None:
        """Takes over the objectives' parameters of a run that had the same settings.

        Raises:
            ValueError: the run had others; names the field and both values.
        """
        checkpoint = _saved_run(Path(path))
        before, state = plain(checkpoint.get("cfg")) or {}, checkpoint.get("criterion") or {}
        for term in self.terms:
            own, prefix = term.objective.state_dict(), f"{term.path}."
            found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            if not own:  # criterion.projection=identity
                continue
            if not found:
                logger.warning(
                    f"criterion.init_from: {path} holds no projections or heads of {term.field}, they start afresh "
                    "(projections as the identity); give stage 1's checkpoint, or null"
                )
                continue
            saved = before
            for part in term.field.split("."):
                saved = saved.get(part) or {}
            mine, theirs = (term.objective.settings(cfg) for cfg in (term.cfg, saved))
            shapes = [{k: list(v.shape) for k, v in side.items()} for side in (found, own)]
            compared = [(f"{term.field}.{name}", value, mine.get(name)) for name, value in theirs.items()]
            target = getattr(term.objective, "target", None)
            if target is not None:  # a class is a number in the head
                labels = ((before.get("task") or {}).get("targets") or {}).get(target.name) or {}
                compared.append((f"task.targets.{target.name}.classes", labels.get("classes"), list(target.classes)))
            for name, other, value in [*compared, ("shapes of projections", *shapes)]:
                if other != value:
                    raise ValueError(
                        f"criterion.init_from: {path}: its projections were trained with {name} = {other}, here it is "
                        f"{value}; give both runs the same, or start from the identity with criterion.init_from=null"
                    )
            term.objective.load_state_dict(found)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, float, Dict]:
        """Loss of one batch.

        Args:
            model: the student.
            sample: ``net_input`` with ``source`` (B, N) and perhaps ``padding_mask`` (B, N); perhaps ``source_bits``,
                the source before it was rounded, and ``masked``, see :meth:`SpeechDataset.collater`; labels for
                objectives that need some.

        Returns:
            scalar loss, its weight in the update (see :meth:`SkillDistillationTask.batch_weight`; fairseq divides the
            summed gradients by the summed weights), sums over frames to log.
        """
        net_input = dict(sample["net_input"])
        if "source_bits" in sample:
            net_input["source"] = sample["source_bits"].view(torch.float32)
        source, padding = net_input["source"], net_input.get("padding_mask")
        # In validation the dataset masks nothing.
        masked = sample.get("masked") or {}
        if self.training and len(masked) < len(self.maskings):
            raise ValueError(f"sample: 'masked' holds {len(masked)} masks; expected one for each of {self.maskings}")
        # The gates before all else: the host waits for them, and the device should have nothing left to do by then.
        draw = model.draw_gates()
        # Then the teachers: their memory is free again before the student's activations pile up.
        teacher: Dict[Tap, Tensor] = {}
        for index in sorted({tap.teacher for tap in self.teacher_taps}):
            taps = [tap for tap in self.teacher_taps if tap.teacher == index]
            teacher.update(zip(taps, self.task.teachers[index].tap(source, padding, taps, masked)))
        out = model(**net_input, draw=draw, taps=self.student_taps, masked=masked)
        student: Dict[Tap, Tensor] = dict(zip(self.student_taps, out["taps"]))
        mask = out["padding_mask"]
        losses: List[Tensor] = []
        values: Dict[str, Tensor] = {}
        ratios: Dict[str, Tensor] = {}
        for term in self.terms:
            asked = term.objective.student_taps, term.objective.teacher_taps
            found = ([side[tap] for tap in taps] for side, taps in zip((student, teacher), asked))
            loss, terms = term.objective(*found, mask, sample)
            losses.append(term.weight * loss)
            for name, value in terms.items():
                (ratios if value.dim() else values)[f"{term.prefix}{name}"] = value
            if term.prefix:
                values[f"{term.prefix}loss"] = loss
        loss = distillation = torch.stack(losses).sum()
        values = {"distillation_loss": distillation, **values}
        if self.constraint is not None:
            targets, update = self.constraint.targets, self.task.num_updates
            expected = [each.cost.sparsity(self.student_config, out["expected_widths"]) for each in targets]
            if self.training:
                loss = loss + self.constraint(expected, update)
            ends = [f"_{each.cost.name}" if len(targets) > 1 else "" for each in targets]
            values.update({f"expected_sparsity{end}": sparsity for end, sparsity in zip(ends, expected)})
            values.update(self.constraint.named_parameters())
        # A tensor on every rank, padded or not: fairseq sums tensors and numbers over ranks apart.
        samples = source.new_full((), source.numel(), dtype=torch.float64)
        if padding is not None:
            samples = samples - padding.sum()
        values["loss"] = loss
        if mask is None:
            count = source.size(0) * self.task.student_config.num_output_frames(source.size(1))
        else:
            count = int((~mask).sum())
        # They stay on the device: to fetch a number here would keep the backward pass waiting. Copies, as float64.
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
        # The size term is the same in every batch of an update, so that it counts once there.
        weight = self.task.batch_weight(count) if self.training else 1.0
        return loss * weight, weight, log

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Means over all frames, and quotients of sums; audio per second of training."""
        frames = sum(log.get("frames", 0) for log in logging_outputs)
        if not frames:
            return
        counted = {"frames", "nsentences", "ntokens", "audio_seconds"}
        for name in logging_outputs[0]:
            if f"{name}{OF}" in logging_outputs[0]:
                above, below = (sum(float(log.get(key, 0)) for log in logging_outputs) for key in (name, f"{name}{OF}"))
                if below:
                    metrics.log_scalar(name, above / below, below, round=4)
            elif name not in counted and not name.endswith(OF):
                mean = sum(log.get(name, 0.0) for log in logging_outputs) / frames
                metrics.log_scalar(name, mean, frames, round=4)
        metrics.log_speed("audio_s_per_s", sum(log.get("audio_seconds", 0.0) for log in logging_outputs), round=1)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Yes: every value is a number or a scalar tensor."""
        return True


def _learns_from_labels(kind: str) -> bool:
    return bool(getattr(OBJECTIVES[kind][0], "supervised", False))


def _read_objective(given: Any, field: str) -> Tuple[str, float, bool, Any]:
    """Name, weight, whether it hears the adapters, and typed config of an objective.

    Raises:
        ValueError: names the field.
    """
    fields = dict(plain(given)) if OmegaConf.is_dict(given) else {}
    kind, weight, adapters = fields.pop("_name", None), fields.pop("weight", 1.0), fields.pop("adapters", True)
    if kind not in OBJECTIVES:
        raise ValueError(f"{field}._name: {kind!r}; expected one of {', '.join(sorted(OBJECTIVES))}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"{field}.weight: {weight!r}; expected a number of at least 0")
    if not isinstance(adapters, bool):
        raise ValueError(f"{field}.adapters: {adapters!r}; expected true or false")
    try:
        return kind, float(weight), adapters, OmegaConf.merge(OmegaConf.structured(OBJECTIVES[kind][1]), fields)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(OBJECTIVES[kind][1]))
        raise ValueError(f"{field}: {str(error).splitlines()[0]}; {kind} has the fields {known}") from error


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
