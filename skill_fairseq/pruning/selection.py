"""Selects the units to keep: rounding of each gate, then a global correction to match a cost."""

from __future__ import annotations

from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import Widths, flat_widths, from_flat, widths_of
from skill_fairseq.modules.units import UNITS
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.expected import smallest_widths
from skill_fairseq.pruning.targets import Asked, as_targets

Selection = Dict[str, Tensor]
"""Gate name -> (num_units,) bool, True for each kept unit."""


class Ranked(NamedTuple):
    """Units of a vector of gates, most wanted first.

    Attributes:
        name: name of the vector.
        order: the units.
        log_alpha: their ``log_alpha``, in that order.
        at_least: number of units that must stay.
    """

    name: str
    order: List[int]
    log_alpha: List[float]
    at_least: int


def select_units(encoder: SpeechEncoder, sparsity: Optional[Asked] = None, cost: Cost = PARAMETERS) -> Selection:
    """Selects the units to keep when shrinking an encoder.

    Without a sparsity these are the units that evaluation keeps. With one, gates are opened or closed one unit at a
    time, always the least wanted open (or the most wanted closed) unit whose cost brings the encoder closer to ``(1 -
    sparsity) * original cost``, until there is none: the cost is then off by less than the smallest unit's. Units
    without a cost of their own, such as ranks of a matrix that is smaller unfactored, move with the next one that has a
    cost. With several targets no cost exceeds its target, and the binding one is below by less than the smallest
    unit's.

    Args:
        encoder: with gates.
        sparsity: fraction of the original cost to remove, in [0, 1); or several targets.
        cost: the cost to reduce.

    Raises:
        ValueError: no gates, or the sparsity cannot be reached with them.
    """
    gates = dict(encoder.named_gates())
    if not gates:
        raise ValueError("the encoder has no gates: it is a teacher or already shrunk; give a stage-1 checkpoint")
    if sparsity is None:
        return {name: gate.kept() for name, gate in gates.items()}

    targets = as_targets(sparsity, cost)
    limits = []
    for target in targets:
        check_reachable(encoder.config, target.sparsity, "sparsity", target.cost)
        original = target.cost.original(encoder.config)
        limit = (1 - target.sparsity) * original
        limits.append(round(limit) if isinstance(original, int) else limit)
    table = []
    for name, gate in gates.items():
        values, order = gate.log_alpha.detach().cpu().sort(descending=True, stable=True)
        table.append(Ranked(name, order.tolist(), values.tolist(), UNITS[gate.unit].least))
    counts = {name: max(int(gate.kept().sum()), UNITS[gate.unit].least) for name, gate in gates.items()}
    if len(targets) == 1:
        correct(table, counts, limits[0], lambda kept: _cost_with(encoder, kept, targets[0].cost))
    else:

        def most(kept: Dict[str, int]) -> float:
            return max(_cost_with(encoder, kept, target.cost) / limit for target, limit in zip(targets, limits))

        correct(table, counts, 1.0, most)
        _keep_below(table, counts, 1.0, most)

    selection = {}
    for entry in table:
        mask = gates[entry.name].kept() & False
        mask[entry.order[: counts[entry.name]]] = True
        selection[entry.name] = mask
    return selection


def selected_cost(encoder: SpeechEncoder, sparsity: Optional[Asked] = None, cost: Cost = PARAMETERS) -> float:
    """The cost after shrinking to a sparsity or targets (None: by rounding), without changing the encoder.

    Raises:
        ValueError: see :func:`select_units`.
    """
    selection = select_units(encoder, sparsity, cost)
    return _cost_with(encoder, {name: int(mask.sum()) for name, mask in selection.items()}, cost)


def apply_selection(encoder: SpeechEncoder, selection: Optional[Selection]) -> None:
    """Makes evaluation of the gated encoder keep exactly these units; None restores rounding."""
    for name, gate in encoder.named_gates():
        gate.set_kept(None if selection is None else selection[name])


def check_reachable(config: EncoderConfig, sparsity: float, field: str, cost: Cost = PARAMETERS) -> None:
    """Refuses a sparsity that the encoder's gates cannot reach.

    Raises:
        ValueError: names ``field``, the value and the reachable range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"{field}: {sparsity} is not a sparsity; expected a number in [0, 1): 0.75 leaves a quarter")
    most = float(cost.sparsity(config, smallest_widths(config)))
    least = float(cost.sparsity(config, widths_of(config)))
    if not least - 1e-9 <= sparsity <= most:
        raise ValueError(
            f"{field}: {sparsity} of {cost} cannot be reached: gates on {config.pruning_units} allow "
            f"{max(least, 0):.4f} to {most:.4f}; choose a sparsity in between, or gate more units (model.pruning_units)"
        )


def correct(
    gates: Sequence[Ranked], counts: Dict[str, int], target: float, cost_with: Callable[[Dict[str, int]], float]
) -> None:
    """Moves ``counts`` unit by unit until the cost is as close to ``target`` as single units allow."""
    found, by_name = cost_with(counts), {gate.name: gate for gate in gates}
    while found != target:
        step = -1 if found > target else 1
        moves = []
        for gate in gates:
            count = counts[gate.name]
            if (step < 0 and count > gate.at_least) or (step > 0 and count < len(gate.order)):
                # The candidate: the least wanted open unit, or the most wanted closed one.
                moves.append((-step * gate.log_alpha[count - 1 if step < 0 else count], gate.name))
        for _, name in sorted(moves):
            count, new = _first_that_counts(counts, by_name[name], step, found, cost_with)
            # A unit behind a closed gate costs nothing, so moving it is no progress.
            if new != found and abs(new - target) < abs(found - target):
                counts[name] = count
                found = new
                break
        else:
            return


def _first_that_counts(
    counts: Dict[str, int], gate: Ranked, step: int, found: float, cost_with: Callable[[Dict[str, int]], float]
) -> Tuple[int, float]:
    """The nearest count of open units, in a direction, whose cost differs from ``found``, and that cost.

    The cost never falls as units open. If no count of this gate changes it, returns the farthest one.
    """

    def cost_at(count: int) -> float:
        return cost_with({**counts, gate.name: count})

    near, last = counts[gate.name] + step, gate.at_least if step < 0 else len(gate.order)
    new = cost_at(near)
    if new != found or cost_at(last) == found:
        return near, new
    while abs(last - near) > 1:  # the cost changes between near and last
        middle = (near + last) // 2
        near, last = (middle, last) if cost_at(middle) == found else (near, middle)
    return last, cost_at(last)


def _keep_below(
    gates: List[Ranked], counts: Dict[str, int], limit: float, cost_with: Callable[[Dict[str, int]], float]
) -> None:
    """Closes the least wanted units until the cost is within the limit, then opens those that still fit."""
    found, by_name = cost_with(counts), {gate.name: gate for gate in gates}
    while found > limit:
        moves = [(g.log_alpha[counts[g.name] - 1], g.name) for g in gates if counts[g.name] > g.at_least]
        for _, name in sorted(moves):
            count, new = _first_that_counts(counts, by_name[name], -1, found, cost_with)
            if new < found:
                counts[name] = count
                found = new
                break
        else:
            return
    grew = True
    while grew:
        grew = False
        moves = [(-g.log_alpha[counts[g.name]], g.name) for g in gates if counts[g.name] < len(g.order)]
        for _, name in sorted(moves):
            count, new = _first_that_counts(counts, by_name[name], 1, found, cost_with)
            if found < new <= limit:
                counts[name] = count
                found, grew = new, True
                break


def _cost_with(encoder: SpeechEncoder, kept: Dict[str, int], cost: Cost) -> float:
    return cost(encoder.config, kept_widths(encoder, kept))  # type: ignore[return-value]


def kept_widths(encoder: SpeechEncoder, kept: Dict[str, int]) -> Widths:
    """Widths of the encoder if each gate keeps this many units (gate name -> count)."""
    exact = widths_of(encoder.config)
    flat = flat_widths(exact)
    for name, gate in encoder.named_gates():
        flat[gate.position] = kept.get(name, gate.num_units)
    return from_flat(flat, exact)
