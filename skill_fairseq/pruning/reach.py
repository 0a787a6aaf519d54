"""Checks whether stage 1 can reach its target sparsity, and whether it did.

An update moves a gate's ``log_alpha`` by about the gates' learning rate and hardly more, because Adam divides each
gradient by its magnitude. Over a run, gates move by at most the sum of all rates, which the schedule fixes in advance.
"""

from __future__ import annotations

import logging
import math
from typing import Any, List, NamedTuple, Optional, Sequence

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.expected import expected_sparsity
from skill_fairseq.pruning.lagrangian import linear_warmup_decay, updates_of
from skill_fairseq.pruning.selection import selected_cost
from skill_fairseq.pruning.targets import Asked, Target, as_targets

logger = logging.getLogger(__name__)

MARGIN = 1.5
"""How far gates should be able to move in a run, as a multiple of the distance from open to closed: gates do not start
to close in the first update, and not all of them close. Measured: 100 updates of config/distill/tiny.yaml end at 0.745
with 1.5, at 0.607 with 1."""
SETTLING = 0.1
"""Share of the updates that should remain after the target has reached its full value."""
ARRIVED = 0.02
"""Difference between expected and target sparsity at the end of stage 1 that causes a warning."""
NEAR = 0.05
"""Difference between requested and expected sparsity at which shrinking chooses badly."""


class GateSchedule(NamedTuple):
    """The gates' learning rate over a run.

    Attributes:
        field: config field of the peak rate.
        peak: peak rate.
        factors: sum of the schedule's factors on the peak over all updates; exact, or an upper bound.
    """

    field: str
    peak: float
    factors: float

    @property
    def travel(self) -> float:
        """About how far a ``log_alpha`` can move in total."""
        return self.peak * self.factors


def schedule_factors(scheduler: Any, max_update: int) -> float:
    """Sum of the scheduler's factors on the peak rate over the updates 0 .. max_update - 1.

    Args:
        scheduler: config of an lr_scheduler. ``linear_warmup_decay`` is summed exactly; for any other the factor is
            taken as 1.
        max_update: updates of the run.
    """
    if scheduler is None or _get(scheduler, "_name") != "linear_warmup_decay":
        return float(max_update)
    total = int(_get(scheduler, "total_num_update") or max_update)
    warmup = updates_of(_get(scheduler, "warmup_updates"), total, "lr_scheduler.warmup_updates")
    decay = _get(scheduler, "decay") or "linear"
    return sum(linear_warmup_decay(u, warmup, total, decay) for u in range(max_update))


def gate_schedule(cfg: Any) -> Optional[GateSchedule]:
    """The gates' learning rate, from fairseq's whole config; None if the run has no optimization.max_update.

    The optimizer may be ``composite`` with a group ``gates``, or one for all parameters.
    """
    max_update = int(_get(cfg.optimization, "max_update") or 0)
    if max_update <= 0:
        return None
    group = _get(_get(cfg.optimizer, "groups") or {}, "gates")
    if group is None:
        return GateSchedule(
            "optimization.lr", max(cfg.optimization.lr), schedule_factors(_get(cfg, "lr_scheduler"), max_update)
        )
    factors = schedule_factors(_get(group, "lr_scheduler"), max_update)
    if _get(group, "lr_float") is not None:
        return GateSchedule("optimizer.groups.gates.lr_float", group["lr_float"], factors)
    rates = _get(group, "lr") or cfg.optimization.lr
    return GateSchedule("optimizer.groups.gates.lr", max(rates), factors)


def travel_to(encoder: SpeechEncoder, sparsity: float, cost: Cost = PARAMETERS) -> float:
    """How far every ``log_alpha`` must fall for the gates to expect this sparsity; 0 if they already do.

    Accurate to 1e-3; infinite if even closed gates leave more.
    """
    low, high = 0.0, 1.0
    if expected_sparsity(encoder, cost=cost) >= sparsity:
        return 0.0
    while expected_sparsity(encoder, -high, cost) < sparsity:
        low, high = high, 2 * high
        if high > 1e3:
            return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if expected_sparsity(encoder, -middle, cost) < sparsity else (low, middle)
    return high


def reach_warnings(
    encoder: SpeechEncoder, schedule: GateSchedule, max_update: int, target: float, cost: Cost = PARAMETERS
) -> List[str]:
    """Why the gates may not reach the target from here; empty if they can with some margin."""
    needed = travel_to(encoder, target, cost)
    if schedule.travel >= MARGIN * needed:
        return []
    best = expected_sparsity(encoder, -schedule.travel, cost)
    verdict = "cannot be reached" if best < target else "can hardly be reached"
    remedies = f"Set {schedule.field} to {_round_up(MARGIN * needed / schedule.factors)} or more"
    if schedule.travel > 0:
        remedies += f", or optimization.max_update to {_round_up(MARGIN * needed / schedule.travel * max_update):.0f}"
    return [
        f"criterion.target_sparsity: {target} {verdict}: with {schedule.field}={schedule.peak:g} over "
        f"optimization.max_update={max_update} updates the gates can move by {schedule.travel:.3g}, which would "
        f"give {best:.4f} if all closed at full speed from the start. The target needs {needed:.3g}, and "
        f"{MARGIN:g} times as much is advisable. {remedies}, or lower criterion.target_sparsity"
    ]


def warmup_warnings(warmup: int, max_update: int, target: float) -> List[str]:
    """The problem with a target that rises over ``warmup`` of ``max_update`` updates; empty if there is none."""
    advisable = int((1 - SETTLING) * max_update)
    if warmup <= advisable:
        return []
    if warmup > max_update:
        found = f"at the end the target is {target * max_update / warmup:.4f}, not {target}"
    else:
        found = f"only {max_update - warmup} updates remain after the target has risen to {target}"
    return [
        f"criterion.sparsity_warmup: {warmup} updates, of optimization.max_update={max_update}: {found}. Set "
        f"criterion.sparsity_warmup to {advisable} or less (a tenth to a third of the run is usual), or raise "
        "optimization.max_update"
    ]


def check_reach(cfg: Any, encoder: SpeechEncoder, criterion: Any) -> List[str]:
    """Warns before training if the gates cannot reach the target sparsity within the run's updates.

    Args:
        cfg: fairseq's whole config.
        encoder: the student's encoder.
        criterion: ``skill_group_kd``; without a constraint there are no warnings.

    Returns:
        the warnings, which are also logged.
    """
    constraint = getattr(criterion, "constraint", None)
    schedule = None if constraint is None else gate_schedule(cfg)
    if constraint is None or schedule is None:
        return []
    max_update = int(cfg.optimization.max_update)
    found = []
    for target in constraint.targets:
        if not isinstance(constraint, ExactConstraint):  # it shifts gates as far as needed
            found += reach_warnings(encoder, schedule, max_update, target.sparsity, target.cost)
        found += warmup_warnings(constraint.warmup, max_update, target.sparsity)
    for warning in found:
        logger.warning(warning)
    return found


def sparsity_report(
    encoder: SpeechEncoder, target: float, cost: Cost = PARAMETERS, together: Sequence[Target] = ()
) -> str:
    """Sparsity at the end of stage 1, in one line: expected by the gates, after rounding, after shrinking, and target.

    All are removed fractions of the original cost. ``together`` holds all targets, if there are several.
    """
    full = cost.original(encoder.config)
    rounded, shrunk = (selected_cost(encoder, sparsity, cost) for sparsity in (None, together or target))
    return (
        f"sparsity of {full:,} {cost}: {expected_sparsity(encoder, cost=cost):.4f} expected by the gates, "
        f"{1 - rounded / full:.4f} by rounding them, {1 - shrunk / full:.4f} by skill-shrink, which corrects the "
        f"rounding; the target is {target:.4f}"
    )


def arrival_warning(expected: float, target: float) -> Optional[str]:
    """Advice for the end of stage 1 if the gates expect another sparsity than the target; otherwise None."""
    if abs(expected - target) <= ARRIVED:
        return None
    short = expected < target
    found = "short of" if short else "beyond"
    remedy = (
        "train longer (optimization.max_update), or raise optimizer.groups.gates.lr_float and "
        "optimizer.groups.multipliers.lr_float"
        if short
        else "train longer (optimization.max_update), so that the multipliers settle, or lower "
        "optimizer.groups.multipliers.lr_float"
    )
    return (
        f"stage 1 ended {abs(expected - target):.4f} {found} criterion.target_sparsity={target}: the gates expect "
        f"{expected:.4f}, and shrinking to the target will {'close' if short else 'open'} units that training left "
        f"{'open' if short else 'closed'}. Better {remedy}; or shrink to what the gates expect: "
        f"skill-shrink --sparsity {expected:.3f}"
    )


def log_sparsity(encoder: SpeechEncoder, target: Asked, cost: Cost = PARAMETERS) -> None:
    """Logs :func:`sparsity_report` of each target, and a warning if gates missed the binding one."""
    targets = as_targets(target, cost)
    found = {each: expected_sparsity(encoder, cost=each.cost) for each in targets}
    for each in targets:
        logger.info(sparsity_report(encoder, each.sparsity, each.cost, targets if len(targets) > 1 else ()))
    binds = min(targets, key=lambda each: found[each] - each.sparsity)
    warning = arrival_warning(found[binds], binds.sparsity)
    if warning is not None:
        logger.warning(warning)


def far_from_gates(encoder: SpeechEncoder, asked: Asked, field: str, cost: Cost = PARAMETERS) -> Optional[str]:
    """A warning about shrinking to a sparsity far from the expected one; None if it is close.

    Args:
        encoder: with gates.
        asked: sparsity, or targets, of which the binding one counts; None: no warning.
        field: config field or option, for messages.
        cost: the cost that the sparsity refers to.
    """
    if not isinstance(asked, float):
        if not asked:
            return None
        cost, asked = min(as_targets(asked, cost), key=lambda t: expected_sparsity(encoder, cost=t.cost) - t.sparsity)
    expected = expected_sparsity(encoder, cost=cost)
    if abs(asked - expected) <= NEAR:
        return None
    low, high = max(expected - NEAR, 0.0), min(expected + NEAR, 0.999)
    return (
        f"{field}: {asked} is {abs(asked - expected):.2f} away from the {expected:.4f} that the gates expect. Units "
        "are then opened or closed by their gates only, regardless of their cost (attention heads tend to go before "
        "FFN units): the student will be worse than one trained for that size. Choose between "
        f"{low:.2f} and {high:.2f}, or train stage 1 with criterion.target_sparsity={asked}"
    )


def _get(config: Any, name: str) -> Any:
    """A field of a dictionary or a config, None if missing."""
    return config[name] if name in config else None


def _round_up(value: float) -> float:
    """Rounds up to two significant digits."""
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.10g}")
