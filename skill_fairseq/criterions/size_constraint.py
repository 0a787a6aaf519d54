"""The size constraint: config fields for the student's size and for how its gates reach it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Type

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II, open_dict

from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.files import named
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.costs import PARAMETERS, make_cost
from skill_fairseq.pruning.elastic import ElasticConstraint, NestedSizes, read_sizes
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.lagrangian import CostConstraint, updates_of
from skill_fairseq.pruning.latency import read_table, table_text
from skill_fairseq.pruning.selection import check_reachable
from skill_fairseq.pruning.targets import SCHEDULES, Constraint, Target, read_targets

NEAR = 0.01
"""A nested student's size may differ by this much from the largest trained size and still count as equal."""
CONSTRAINTS: Dict[str, Type[Constraint]] = {"lagrangian": CostConstraint, "exact": ExactConstraint}
"""Methods that bring gates to their target, by name."""


@dataclass
class SizeConstraintConfig(FairseqDataclass):
    """Fields of all distillation criterions: initialisation, and the student's size."""

    init_from: Optional[str] = field(
        default=None, metadata={"help": "checkpoint whose projections and heads to start from, for stage 2"}
    )
    target: Optional[Any] = field(
        default=None,
        metadata={
            "help": "share of each cost to keep, {macs: 0.25} or {parameters: 0.25, macs: 0.2, seconds: 10}: all are "
            "met; replaces target_sparsity, the share of one cost to remove"
        },
    )
    target_sparsity: Optional[float] = field(
        default=None, metadata={"help": "fraction of the cost to prune, in [0, 1); null: no constraint"}
    )
    cost: str = field(default="parameters", metadata={"help": "cost that target_sparsity means: parameters or macs"})
    cost_seconds: Optional[float] = field(
        default=None, metadata={"help": "utterance length for MACs, seconds; null: 10"}
    )
    sparsity_warmup: float = field(
        default=5000, metadata={"help": "updates over which the target rises from 0, or a fraction of all, such as 0.1"}
    )
    sparsity_schedule: ChoiceEnum(list(SCHEDULES)) = field(  # type: ignore[valid-type]
        default="linear", metadata={"help": "how the target rises; exponential: by equal factors of what remains"}
    )
    constraint: ChoiceEnum(list(CONSTRAINTS)) = field(  # type: ignore[valid-type]
        default="lagrangian",
        metadata={"help": "lagrangian: multipliers drive to the target; exact: a shift of all gates keeps them there"},
    )
    elastic: Optional[Any] = field(
        default=None,
        metadata={
            "help": "all sizes from one run: {smallest: 0.1, largest: 0.5, between: 1}, shares of the cost to keep; "
            "each update trains both ends and this many sizes between; replaces target and target_sparsity, needs "
            "constraint=exact; valid: [...] are the sizes to validate"
        },
    )
    max_update: int = field(
        default=II("optimization.max_update"), metadata={"help": "updates that a fraction in sparsity_warmup refers to"}
    )


def build_constraint(cfg: Any, student: EncoderConfig, nested: bool = False) -> Optional[Constraint]:
    """The configured size constraint, None without a target.

    Args:
        cfg: the criterion's config; values that come from files or from other fields are filled in.
        student: the student's shape.
        nested: the gates only hold an order: stage 2 of an elastic run.

    Raises:
        ValueError: gates without a target, a target without gates, or an unreachable target; names the field.
    """
    if nested and cfg.elastic is None:
        raise ValueError(
            "model.nested: true, but criterion.elastic is null; give the sizes to train, such as {smallest: 0.1, "
            "largest: 0.5}"
        )
    if cfg.elastic is not None:
        return _elastic(cfg, student, nested)
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
                    f"criterion.{other}: {cfg[other]} conflicts with criterion.target={asked}, which replaces it; "
                    f"set criterion.{other}={'null' if unset is None else unset}"
                )
        if isinstance(asked, dict) and isinstance(asked.get("table"), str):  # so that the checkpoint holds it
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


def _elastic(cfg: Any, student: EncoderConfig, nested: bool) -> ElasticConstraint:
    """The constraint of an elastic run; fills in the sparsity of its largest size in ``cfg``."""
    field = "criterion.elastic"
    sizes = read_sizes(plain(cfg.elastic), field)
    if str(cfg.constraint) != "exact":
        raise ValueError(
            f"criterion.constraint: {cfg.constraint}, but {field} needs exact; set criterion.constraint=exact"
        )
    follows = 1 - sizes.largest
    for name, allowed in (("target", None), ("target_sparsity", follows)):
        found = plain(cfg[name])
        if found is not None and (allowed is None or abs(found - allowed) > 1e-9):
            raise ValueError(f"criterion.{name}: {found} conflicts with {field}, which replaces it; set it to null")
    if not student.pruning_units:
        raise ValueError(
            f"{field}: {plain(cfg.elastic)}, but the student has no gates; set model.pruning_units in stage 1, or "
            "model.nested=true in stage 2"
        )
    try:
        cost = make_cost(cfg.cost, cost_seconds=cfg.cost_seconds)
    except ValueError as error:
        raise ValueError(f"criterion.{error}") from error
    with open_dict(cfg):
        cfg.target_sparsity = follows
    check_reachable(student, 1 - sizes.smallest, f"{field}.smallest (1 - {sizes.smallest})", cost)
    if nested:
        has = 1 - float(cost.sparsity(student, widths_of(student)))
        if abs(has - sizes.largest) > NEAR:
            raise ValueError(
                f"{field}.largest: {sizes.largest}, but the student has {has:.4f} of the {cost} before pruning; set "
                f"{field}.largest to {has:.2g}, as in stage 1"
            )
        return NestedSizes(sizes, cost)
    check_reachable(student, follows, f"{field}.largest (1 - {sizes.largest})", cost)
    total = cfg.max_update if 0 < cfg.sparsity_warmup < 1 else 0
    warmup = updates_of(cfg.sparsity_warmup, total, "criterion.sparsity_warmup")
    return ElasticConstraint(sizes, warmup, cost, str(cfg.sparsity_schedule))
